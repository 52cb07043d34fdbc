"""pyreft's six interventions: this library's edits, under pyreft's names and with its constructor's arguments."""

from __future__ import annotations

import inspect
import logging
import weakref
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from reftune.edits import ConsreftEdit, DireftEdit, DireftOrthogonalEdit, LobireftEdit, LoreftEdit, NoreftEdit
from reftune.errors import ReftuneError

logger = logging.getLogger(__name__)


class Rotation:
    """pyreft's ``rotate_layer``: h @ R^T.

    Attributes:
        weight: R^T, width x r, with orthonormal columns.
    """

    def __init__(self, weight: Float[Tensor, "width r"]):
        self.weight = weight

    def __call__(self, h: Tensor) -> Tensor:
        """The coordinates of h."""
        return h.to(self.weight.dtype) @ self.weight


class Projection:
    """pyreft's ``learned_source`` and ``proj_layer``, linear layers: Wh + b.

    Attributes:
        weight: W, r x width.
        bias: b, r numbers, or None.
    """

    def __init__(self, weight: Float[Tensor, "r width"], bias: Float[Tensor, " r"] | None):
        self.weight, self.bias = weight, bias

    def __call__(self, h: Tensor) -> Tensor:
        """Wh + b."""
        return F.linear(h.to(self.weight.dtype), self.weight, self.bias)


class CallableDropout(float):
    """A dropout probability that can be called as pyreft's layer is."""

    def __new__(cls, value: float, edit: nn.Module) -> CallableDropout:
        """The probability of ``edit``, whose mode decides whether anything is dropped."""
        made = super().__new__(cls, value)
        made.edit = weakref.ref(edit)
        return made

    edit: weakref.ref[nn.Module]

    def __call__(self, x: Tensor) -> Tensor:
        """Drop elements of x in training."""
        edit = self.edit()
        return F.dropout(x, float(self), edit is not None and edit.training)

    def __reduce__(self) -> Any:
        return float, (float(self),)


class CallableActivation(str):
    """An activation's name that can be called as pyreft's function is."""

    def __new__(cls, value: str | None, edit: Any) -> CallableActivation:
        """The activation of ``edit``; None is ``"linear"``."""
        made = super().__new__(cls, value or "linear")
        made.function = edit.__dict__["_activation"]
        return made

    function: Any

    def __call__(self, x: Tensor) -> Tensor:
        """The activation of each element."""
        return self.function(x)

    def __reduce__(self) -> Any:
        return str, (str(self),)


class _PyreftArguments:
    """Translates pyreft's constructor: mixed in before an edit.

    Args:
        embed_dim: width of the hidden state.
        low_rank_dimension: rank.
        dropout: probability of dropping an element of the edit (pyreft: of the whole edited state, in evaluation too).
        act_fn: activation, by its transformers name; None or ``"linear"`` for none.
        add_bias: a bias in the projection, where the intervention has that option.
        init: ``"paper"`` starts as pyreft does, ``"identity"`` starts as the base model.
        parametrization: ``"cholesky"``, or ``"householder"`` for pyreft's training curve.
        dtype: accepted and not needed: parameters are float32 whatever the model's dtype.
        **other: pyvene's settings, which have no meaning here.
    """

    method: str
    keep_last_dim = True

    def __init__(
        self,
        embed_dim: int,
        low_rank_dimension: int,
        dropout: float = 0.0,
        act_fn: str | None = None,
        add_bias: bool = False,
        init: str = "paper",
        parametrization: str = "cholesky",
        dtype: Any = None,
        **other: Any,
    ) -> None:
        given: dict[str, Any] = {
            "dropout": dropout,
            "act_fn": act_fn,
            "add_bias": bool(add_bias),
            "init": init,
            "parametrization": parametrization,
        }
        edit: Any = next(c for c in type(self).__mro__ if c.__module__.startswith("reftune.edits"))
        taken = inspect.signature(edit.__init__).parameters
        if other:
            logger.info("%s leaves %s aside", type(self).__name__, ", ".join(other))
        options = {name: value for name, value in given.items() if name in taken}
        super().__init__(embed_dim, low_rank_dimension, **options)  # pyright: ignore[reportCallIssue]
        if self.own_forward is not None:  # such code calls self.dropout(x) and self.act_fn(x)
            own: Any = self
            own.dropout, own.act_fn = CallableDropout(own.dropout, own), CallableActivation(own.act_fn, own)

    def __getitem__(self, index: int) -> Any:
        """Itself under 0: pyvene's ``interventions`` held pairs that began with it, and scripts say ``v[0].eval()``."""
        if index != 0:
            raise IndexError(index)
        return self

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Let a subclass write ``forward(base, source=None, subspaces=None)`` as it would for pyvene."""
        super().__init_subclass__(**kwargs)
        own = cls.__dict__.get("forward")
        if own is not None and {"source", "subspaces"} & set(inspect.signature(own).parameters):
            cls.own_forward = own
            cls.forward = _forward_of_rows  # type: ignore[attr-defined]

    own_forward: ClassVar[Any] = None
    call: tuple[int, Any] | None = None
    """Rows of the batch and the subspaces of each, while a model with a subclass's own forward runs."""

    @property
    def rotate_layer(self) -> Rotation:
        """R^T, width x r: ``rotate_layer(h)`` are the coordinates of h, ``rotate_layer.weight`` the matrix."""
        edit: Any = self
        if not hasattr(edit, "current_rotation"):
            raise AttributeError(f"{type(self).__name__} has no rotate_layer: its directions are not orthonormal.")
        return Rotation(edit.current_rotation(torch.float32).mT)

    @property
    def proj_layer(self) -> Projection:
        """P and its bias, r x width: of those interventions that project without a rotation."""
        return Projection(self.projection, getattr(self, "offset", None))  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def learned_source(self) -> Projection | Tensor:
        """What is learned beside the directions: W and b, or b alone where the edit is a constant."""
        edit: Any = self
        return Projection(edit.weight, edit.bias) if hasattr(edit, "weight") else edit.bias

    @property
    def embed_dim(self) -> int:
        """Width of the hidden state."""
        return self.width  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def low_rank_dimension(self) -> int:
        """Rank."""
        return self.r  # pyright: ignore[reportAttributeAccessIssue]


def _forward_of_rows(self: Any, base: Tensor, source: Any = None, subspaces: Any = None) -> Tensor:
    """The engine hands over the edited tokens of all rows, (tokens, width); such code expects (rows, tokens, width).

    Raises:
        ReftuneError: rows with different numbers of edited tokens, which have no such shape.
    """
    if self.call is None or base.dim() != 2:
        return self.own_forward(base, source, subspaces)
    rows, own = self.call
    if base.shape[0] % rows:
        raise ReftuneError(
            f"{type(self).__name__}.forward: {base.shape[0]} edited tokens in {rows} rows; an intervention that "
            "defines forward needs as many locations in each row."
        )
    shaped = base.reshape(rows, -1, base.shape[-1])
    return self.own_forward(shaped, source, own).reshape(base.shape)


class LoreftIntervention(_PyreftArguments, LoreftEdit):
    """h + R^T(a(Wh + b) - Rh): LoReFT."""

    method = "loreft"


class NoreftIntervention(_PyreftArguments, NoreftEdit):
    """h + P^T(a(Wh + b) - Ph - c): LoReFT without orthonormal rows; c only with ``add_bias``."""

    method = "noreft"


class ConsreftIntervention(_PyreftArguments, ConsreftEdit):
    """h + R^T(b - Rh): a constant in r directions."""

    method = "consreft"


class LobireftIntervention(_PyreftArguments, LobireftEdit):
    """h + R^T b: a low-rank bias."""

    method = "lobireft"


class DireftIntervention(_PyreftArguments, DireftOrthogonalEdit):
    """h + R^T a(Wh + b): pyreft's Direft, an ablation with an orthonormal projection."""

    method = "direft_orthogonal"


class NodireftIntervention(_PyreftArguments, DireftEdit):
    """h + P^T a(Wh + b): the paper's DiReFT, which pyreft calls Nodireft."""

    method = "direft"


INTERVENTIONS: dict[str, type[Any]] = {
    cls.__name__: cls
    for cls in (
        LoreftIntervention,
        NoreftIntervention,
        ConsreftIntervention,
        LobireftIntervention,
        DireftIntervention,
        NodireftIntervention,
    )
}
"""The interventions by pyreft's class names, as its checkpoints record them."""

BY_METHOD: dict[str, type[Any]] = {cls.method: cls for cls in INTERVENTIONS.values()}
"""The interventions by this library's method names, as our checkpoints record them."""
