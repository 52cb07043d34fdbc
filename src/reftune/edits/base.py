"""What every edit shares: arithmetic in float32, dropout on the change alone, validated options."""

import contextlib
import copy
import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from reftune.edits.activations import activation, is_linear
from reftune.errors import ReftuneError

Init = Literal["identity", "paper"]
Factors = tuple[Float[Tensor, "r width"], Float[Tensor, " r"], Float[Tensor, "r width"]]


@dataclass(frozen=True, eq=False)
class FoldedEdit:
    """h + (hA + b)B: the one form that every linear edit takes at inference.

    Attributes:
        A: reads r coordinates of the hidden state.
        b: is added to them.
        B: writes them back.
    """

    A: Float[Tensor, "width r"]
    b: Float[Tensor, " r"]
    B: Float[Tensor, "r width"]

    def __call__(self, h: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows width"]:
        """The edited hidden state, computed as an edit computes it and returned in the dtype of `h`."""
        x = h.to(compute_dtype(h))
        A, b, B = (tensor.to(x.dtype) for tensor in (self.A, self.b, self.B))
        return (x + (x @ A + b) @ B).to(h.dtype)


class Edit(nn.Module):
    """h + dropout(delta(h)): a change of the hidden state, learned while the model stays as it is.

    A subclass creates its parameters directly on itself, fills them in `reset_parameters` and writes `coordinates`; a
    linear one `factors` too.

    Args:
        width: size of the hidden state's last dimension.
        r: rank, between 1 and `width`.
        dropout: probability with which an element of the change (never of `h`) is dropped in training.
        act_fn: name of an activation function, `None` for linear.
        init: `"identity"` starts as an edit that changes nothing; `"paper"` starts as the reference code does.

    Raises:
        ReftuneError: an option outside its range.
    """

    def __init__(
        self, width: int, r: int, *, dropout: float = 0.0, act_fn: str | None = None, init: Init = "identity"
    ) -> None:
        super().__init__()
        if not 1 <= r <= width:
            raise ReftuneError(f"r={r}: the rank must lie between 1 and the width of the hidden state, {width}")
        if not 0.0 <= dropout < 1.0:
            raise ReftuneError(f"dropout={dropout}: must be at least 0 and below 1")
        if init not in get_args(Init):
            raise ReftuneError(f"init={init!r}: must be one of {', '.join(get_args(Init))}")
        self.width, self.r, self.dropout, self.act_fn, self.init = width, r, float(dropout), act_fn, init
        self.copies = 1  # see `stacked`
        # Straight into __dict__: some activations are modules, and an edit has no nested module (its state-dict keys
        # must end in the name of a tensor of its own).
        self.__dict__["_activation"] = activation(act_fn)

    def reset_parameters(self) -> None:
        """**Overwrites every parameter** with its initial value."""
        raise NotImplementedError

    def stacked(self, copies: int) -> "Edit":
        """Several copies of this edit in one, each in r directions of its own (see ``directions`` of ``forward``).

        Returns:
            An edit of rank copies * r, whose parameters are this one's, one copy below another: ``(copies * r, ...)``.

        Raises:
            ReftuneError: an edit that is not made of r coordinates alone.
        """
        kind = type(self)
        tensors = dict(self.named_parameters())
        by_rows = kind.coordinates is not Edit.coordinates and kind.change is Edit.change
        if (
            not by_rows
            or any(len(tensor) != self.r for tensor in tensors.values())
            or any(True for _ in self.buffers())
        ):
            raise ReftuneError(f"{kind.__name__} cannot be stacked: it is more than r coordinates, each of its own")
        made = copy.deepcopy(self)
        for name, tensor in tensors.items():
            rows = tensor.detach().repeat(copies, *[1] * (tensor.ndim - 1))
            setattr(made, name, nn.Parameter(rows, requires_grad=tensor.requires_grad))
        made.r, made.copies = copies * self.r, copies * self.copies
        return made

    def start_at(self, vector: Float[Tensor, " width"]) -> None:
        """**Overwrites parameters** so that the edit adds this vector to every h, from where training goes on.

        Raises:
            ReftuneError: the method cannot add a constant.
        """
        raise ReftuneError(f"{type(self).__name__} cannot start from a direction: take loreft, direft or lobireft")

    def coordinates(self, h: Float[Tensor, "*rows width"]) -> tuple[Float[Tensor, "*rows r"], Float[Tensor, "r width"]]:
        """The two factors of the formula without `h +`, written by a subclass: r numbers, and the r directions of them.

        `h` and both results are float32, or all are float64.

        Raises:
            ReftuneError: the subclass has only written `change`.
        """
        raise ReftuneError(f"{type(self).__name__} has no directions to choose from: it does not write coordinates(h)")

    def change(self, h: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows width"]:
        """The formula without `h +`; a subclass whose formula is no such product writes this instead."""
        coordinates, basis = self.coordinates(h)
        return coordinates @ basis

    def factors(self, dtype: torch.dtype) -> Factors:
        """The three tensors (W, b, P) with which the linear edit is h + P^T(Wh + b), in `dtype`."""
        raise ReftuneError(f"{type(self).__name__} has no folded form")

    @property
    def folds(self) -> bool:
        """Whether the edit has a folded form."""
        written = type(self).factors is not Edit.factors or type(self).fold is not Edit.fold
        return self.is_linear and written

    @torch.no_grad()
    def fold(self) -> FoldedEdit:
        """The edit as (A, b, B), in the dtype of its parameters: A = W^T, b = b, B = P of its `factors`.

        Raises:
            ReftuneError: the edit has an activation function, so that it is not affine in `h`.
        """
        if not self.is_linear:
            raise ReftuneError(
                f"act_fn={self.act_fn!r}: only a linear edit folds to h + (hA + b)B; call the edit itself instead"
            )
        W, b, P = self.factors(next(self.parameters()).dtype)
        return FoldedEdit(A=W.mT.clone(memory_format=torch.contiguous_format), b=b.clone(), B=P.clone())

    def retract_(self) -> None:
        """**Brings the parameters back** onto their constraint after an optimiser's step; most edits have none."""

    def delta(
        self, h: Float[Tensor, "*rows width"], directions: Float[Tensor, "*#rows r"] | None = None
    ) -> Float[Tensor, "*rows width"]:
        """What the edit adds to `h`, without dropout, in float32 (float64 where `h` is), under autocast too."""
        with without_autocast(h.device.type):
            x = h.to(compute_dtype(h))
            if directions is None:
                return self.change(x)
            coordinates, basis = self.coordinates(x)
            return (coordinates * directions.to(x.dtype)) @ basis

    def forward(
        self, h: Float[Tensor, "*rows width"], directions: Float[Tensor, "*#rows r"] | None = None
    ) -> Float[Tensor, "*rows width"]:
        """The edited hidden state in the dtype of `h`; any number of leading dimensions, and none or many rows.

        Args:
            h: hidden states.
            directions: 1 for those of the r directions that act, else 0; for all rows or for each. None: all act. So
                one rotation can be shared out among several skills, each learned and used in directions of its own.
        """
        change = F.dropout(self.delta(h, directions), self.dropout, self.training)
        return (h.to(change.dtype) + change).to(h.dtype)

    def extra_repr(self) -> str:
        """The options, as `print(model)` shows them."""
        return f"width={self.width}, r={self.r}, dropout={self.dropout}, act_fn={self.act_fn!r}"

    @property
    def is_linear(self) -> bool:
        """Whether the change is affine in `h`: the activation function is the identity."""
        return is_linear(self.act_fn)

    def activate(self, x: Tensor) -> Tensor:
        """The activation function, element by element."""
        return self.__dict__["_activation"](x)


def compute_dtype(h: Tensor) -> torch.dtype:
    """float64 for float64, else float32: a rank-r correction added in bfloat16 would lose most of its digits."""
    return torch.float64 if h.dtype == torch.float64 else torch.float32


@torch.no_grad()
def init_linear_(weight: Float[Tensor, "r width"], bias: Float[Tensor, " r"] | None = None) -> None:
    """**Fills** a weight and a bias as a new `nn.Linear` has them: uniform within 1 / sqrt(width)."""
    bound = 1.0 / math.sqrt(weight.shape[-1])
    weight.uniform_(-bound, bound)
    if bias is not None:
        bias.uniform_(-bound, bound)


def without_autocast(device_type: str) -> contextlib.AbstractContextManager[object]:
    """A context in which autocast does not lower the precision of an edit's matrix products."""
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()
