"""LobiReFT."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from reftune.edits.base import Factors
from reftune.edits.registry import register_edit
from reftune.edits.rotated import RotatedEdit
from reftune.errors import ReftuneError


@register_edit("lobireft")
class LobireftEdit(RotatedEdit):
    """h + R^T b: one vector, the same for every h, added to it (a low-rank bias).

    `rotation` R is `r x width`, `bias` b is `r`. Arithmetic in float32 (float64 for a float64 h). Identity start:
    b = 0; `init="paper"` draws b uniform in [0, 1). Source: pyreft.

    Raises:
        ReftuneError: an activation function.
    """

    tensors = ("bias",)
    nulls = False
    """Take the vector's direction out of h instead of adding it, where h points along it: h - R^T (s a(s R h)), with a
    the ReLU and s the signs of b. Source: arXiv 2505.20809, which trains with it."""

    def check_options(self) -> None:
        """Refuse what this method cannot do."""
        if not self.is_linear:
            raise ReftuneError(f"act_fn={self.act_fn!r}: lobireft has nothing to activate; leave act_fn out")

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """**Overwrites every parameter** with its initial value."""
        self.reset_rotation()
        if self.init == "identity":
            self.bias.zero_()
        else:
            self.bias.uniform_()

    @torch.no_grad()
    def start_at(self, vector: Float[Tensor, " width"]) -> None:
        """**Overwrites every parameter**: b writes the vector along R's first row."""
        self.point_to(vector)
        self.bias.copy_(self.rotation @ vector.to(self.rotation))

    def coordinates(self, h: Float[Tensor, "*rows width"]) -> tuple[Float[Tensor, "*rows r"], Float[Tensor, "r width"]]:
        """Along R: b for every row."""
        if self.nulls:
            R = self.current_rotation(h.dtype)
            signs = torch.where(self.bias < 0, -1, 1).to(h.dtype)
            return -signs * F.relu(signs * F.linear(h, R)), R
        return self.bias.to(h.dtype).expand(*h.shape[:-1], self.r), self.current_rotation(h.dtype)

    def factors(self, dtype: torch.dtype) -> Factors:
        """0, b and R."""
        R = self.current_rotation(dtype)
        return torch.zeros_like(R), self.bias.to(dtype), R
