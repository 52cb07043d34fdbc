"""Distributed alignment search: subspaces of a hidden state that play the part of a causal model's variables.

All variants are one formula. With a rotation R and, for each variable v, a mask m_v over the rotated coordinates,

    h + R^T sum_v  m_v * (R s_v - R h)

puts into h the value that v has in the source s_v. ``Das`` fixes the masks and learns R; ``BoundlessDas`` learns
where each variable's coordinates end, too; ``SigmoidMask`` learns which coordinates, of a rotation or of the neurons
themselves. An alignment is an action of ``reftune.causal.interchange``: trained by ``reftune.causal.training.align``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from reftune.causal.actions import Subspace
from reftune.edits.base import compute_dtype, without_autocast
from reftune.edits.rotation import orthonormal, retract_
from reftune.errors import ReftuneError


class Alignment(nn.Module):
    """h + R^T sum_v m_v * (R s_v - R h).

    Args:
        variables: names of the variables.
        width: of the hidden state.
        size: number of rotated coordinates.
        rotate: whether to learn R; otherwise it is the identity and the coordinates are neurons (size = width).

    Raises:
        ReftuneError: no variables, or a subspace larger than the hidden state.
    """

    def __init__(self, variables: Sequence[str], width: int, size: int, rotate: bool = True) -> None:
        super().__init__()
        self.variables, self.width, self.size = tuple(variables), width, size
        if not self.variables:
            raise ReftuneError("an alignment needs at least one variable")
        if not 1 <= size <= width:
            raise ReftuneError(f"a subspace of {size} directions does not fit a hidden size of {width}")
        self.rotation: nn.Parameter | None = nn.Parameter(torch.randn(size, width)) if rotate else None
        self.temperature = 1.0
        self.retract_()

    def masks(self) -> Float[Tensor, "variables size"]:
        """Which coordinates belong to which variable, between 0 and 1; 0 or 1 in evaluation."""
        raise NotImplementedError

    def penalty(self) -> Tensor:
        """What training keeps small beside its loss; nothing here."""
        return torch.zeros(())

    def mask_parameters(self) -> list[nn.Parameter]:
        """The parameters that are not the rotation."""
        return [parameter for name, parameter in self.named_parameters() if name != "rotation"]

    @torch.no_grad()
    def retract_(self) -> None:
        """**Makes the rotation orthonormal again** after an optimiser's step."""
        if self.rotation is not None:
            retract_(self.rotation)

    def forward(
        self,
        h: Float[Tensor, "units width"],
        sources: Float[Tensor, "units variables width"],
        active: Float[Tensor, "units variables"] | None = None,
    ) -> Float[Tensor, "units width"]:
        """The states with each active variable's value from its source, in the dtype of ``h``.

        Args:
            h: states of the base run.
            sources: the states of each variable's source.
            active: 1 where a variable is interchanged, 0 where it is left; None: all are.
        """
        if h.shape[-1] != self.width:
            raise ReftuneError(f"an alignment of width {self.width} does not fit a hidden state of width {h.shape[-1]}")
        with without_autocast(h.device.type):
            x = h.to(compute_dtype(h))
            gap = sources.to(x.dtype) - x[:, None]
            masks = self.masks().to(x)
            if active is not None:
                gap = gap * active.to(x.dtype)[..., None]
            if self.rotation is None:
                return (x + (gap * masks).sum(1)).to(h.dtype)
            R = orthonormal(self.rotation).to(x.dtype)
            return (x + ((gap @ R.mT) * masks).sum(1) @ R).to(h.dtype)

    @torch.no_grad()
    def subspace(self, variable: str) -> Subspace:
        """The directions of one variable.

        Raises:
            ReftuneError: an unknown variable, or one that was given no direction.
        """
        if variable not in self.variables:
            raise ReftuneError(f"variable {variable!r} is not aligned here; there are {', '.join(self.variables)}")
        kept = self.hard_masks()[self.variables.index(variable)].bool()
        if not bool(kept.any()):
            raise ReftuneError(f"variable {variable!r} ended up with no direction: train longer, or start with more")
        R = torch.eye(self.width, device=kept.device) if self.rotation is None else self.rotation.detach()
        return Subspace(R[kept].clone())

    @torch.no_grad()
    def hard_masks(self) -> Float[Tensor, "variables size"]:
        """The masks as evaluation uses them."""
        was = self.training
        self.training = False
        try:
            return self.masks()
        finally:
            self.training = was


class Das(Alignment):
    """h + R^T sum_v m_v * (R s_v - R h), with as many rows of R for each variable as were asked for.

    Only the rows that some variable uses are kept and trained, so that it is low-rank as it stands: a rotation of the
    whole space restricted to these rows computes the same. Source: arXiv 2303.02536, section 3.

    Args:
        sizes: number of directions of each variable.
        width: of the hidden state.
    """

    def __init__(self, sizes: Mapping[str, int], width: int) -> None:
        if wrong := {name: size for name, size in sizes.items() if size < 1}:
            raise ReftuneError(f"sizes={wrong}: every variable has at least one direction")
        super().__init__(list(sizes), width, sum(sizes.values()))
        owner = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(list(sizes.values())))
        self.register_buffer("_masks", torch.nn.functional.one_hot(owner, len(sizes)).float().mT.contiguous())

    def masks(self) -> Float[Tensor, "variables size"]:
        """One for each variable's own rows."""
        return self.get_buffer("_masks")


class BoundlessDas(Alignment):
    """h + R^T sum_v m_v * (R s_v - R h), with learned boundaries: variable v has the coordinates from b_(v-1) to b_v.

    In training a boundary is soft, m_v = sigmoid((i - b_(v-1)) / T) * sigmoid((b_v - i) / T) at coordinate i, and T
    falls; in evaluation it is hard. ``penalty`` keeps the subspaces small. Source: arXiv 2305.08809, section 3.

    Args:
        variables: their names.
        width: of the hidden state.
        start: share of the coordinates that all variables together have at first.
    """

    def __init__(self, variables: Sequence[str], width: int, start: float = 0.5) -> None:
        super().__init__(variables, width, width)
        if not 0 < start <= 1:
            raise ReftuneError(f"start={start}: a share of the coordinates lies between 0 and 1")
        self.shares = nn.Parameter(torch.full((len(self.variables),), start / len(self.variables)))
        self.temperature = 50.0

    def _ends(self) -> Float[Tensor, " variables"]:
        return (self.shares.clamp(min=0).cumsum(0) * self.size).clamp(max=self.size)

    def masks(self) -> Float[Tensor, "variables size"]:
        """Soft intervals in training, hard ones in evaluation."""
        ends = self._ends()[:, None]
        starts = torch.cat([ends.new_zeros(1, 1), ends[:-1]])
        place = torch.arange(self.size, device=ends.device, dtype=ends.dtype) + 0.5
        if not self.training:
            return ((place > starts) & (place < ends)).to(ends.dtype)
        low, high = (place - starts) / self.temperature, (ends - place) / self.temperature
        # The first interval begins where the coordinates do: nothing lies before it to be shared with.
        first = torch.arange(len(ends), device=ends.device)[:, None] == 0
        return torch.where(first, torch.ones_like(low), low.sigmoid()) * high.sigmoid()

    def penalty(self) -> Tensor:
        """The share of all coordinates that the variables take."""
        return self.shares.clamp(min=0).sum()

    def directions(self) -> dict[str, int]:
        """How many directions each variable has."""
        counts = self.hard_masks().sum(-1).int().tolist()
        return dict(zip(self.variables, counts, strict=True))


class SigmoidMask(Alignment):
    """h + R^T sum_v m_v * (R s_v - R h), each coordinate choosing a variable or none: m = softmax((0, l_1, ...) / T).

    With one variable this is a sigmoid mask. Without rotation it finds neurons. ``penalty`` is the share of coordinates
    taken. The variant of pyvene's SigmoidMaskIntervention, for several variables.

    Args:
        variables: their names.
        width: of the hidden state.
        rotate: whether to learn a rotation as well.
    """

    def __init__(self, variables: Sequence[str], width: int, rotate: bool = False) -> None:
        super().__init__(variables, width, width, rotate)
        self.logits = nn.Parameter(0.01 * torch.randn(len(self.variables), width))

    def masks(self) -> Float[Tensor, "variables size"]:
        """Soft choices in training, hard ones in evaluation."""
        all_logits = torch.cat([self.logits.new_zeros(1, self.size), self.logits])
        soft = (all_logits / self.temperature).softmax(0)
        if self.training:
            return soft[1:]
        return torch.nn.functional.one_hot(soft.argmax(0), len(soft)).to(soft.dtype).mT[1:]

    def penalty(self) -> Tensor:
        """The share of all coordinates that the variables take."""
        return self.masks().mean(-1).sum()
