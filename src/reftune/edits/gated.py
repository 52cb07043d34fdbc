"""An edit behind a gate."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from reftune.edits.base import FoldedEdit
from reftune.edits.direft_orthogonal import DireftOrthogonalEdit
from reftune.edits.registry import register_edit
from reftune.errors import ReftuneError


@register_edit("gated")
class GatedEdit(DireftOrthogonalEdit):
    """h + g(h) R^T a(Wh + b), g(h) = 1 where p^T h > t and 0 elsewhere: only states that a probe tells are edited.

    `rotation` R and `weight` W are `r x width`, `bias` b is `r`; the probe p (`probe`, `width`) and its threshold t
    (`threshold`, 1) are buffers: they are found (`reftune steer --when`), saved and loaded, and never trained, because
    a step has no slope. Arithmetic in float32 (float64 for a float64 h). A new gate is open everywhere (p = 0,
    t = -1). With W = 0 it is `lobireft` behind a gate; with W = -R and b = 0 it takes R out. Identity start: W = 0,
    b = 0. It has no folded form. Source: conditional steering (CAST, arXiv 2409.05907), which decides once a prompt.
    """

    probe: Tensor
    threshold: Tensor

    def make_tensors(self) -> None:
        """As for `RotatedEdit`, with a gate that is open everywhere."""
        super().make_tensors()
        self.register_buffer("probe", torch.zeros(self.width))
        self.register_buffer("threshold", -torch.ones(1))

    @property
    def is_linear(self) -> bool:
        """Never: a step is no affine function of `h`."""
        return False

    def fold(self) -> FoldedEdit:
        """Refused.

        Raises:
            ReftuneError: always.
        """
        raise ReftuneError("A gated edit has no folded form h + (hA + b)B, as its gate is a step; call the edit itself")

    def is_open(self, h: Float[Tensor, "*rows width"]) -> Bool[Tensor, "*rows"]:
        """Which states are edited: p^T h > t."""
        return h @ self.probe.to(h.dtype) > self.threshold.squeeze().to(h.dtype)

    def coordinates(self, h: Float[Tensor, "*rows width"]) -> tuple[Float[Tensor, "*rows r"], Float[Tensor, "r width"]]:
        """a(Wh + b) where the gate is open and 0 elsewhere, along R."""
        W, b, R = self.factors(h.dtype)
        return torch.where(self.is_open(h).unsqueeze(-1), self.activate(F.linear(h, W, b)), 0.0), R
