"""LoReFT."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from reftune.edits.base import Factors, init_linear_
from reftune.edits.registry import register_edit
from reftune.edits.rotated import RotatedEdit
from reftune.errors import ReftuneError


@register_edit("loreft")
class LoreftEdit(RotatedEdit):
    """h + R^T(a(Wh + b) - Rh): within the r directions R, what h reads is replaced by what it should read.

    `rotation` R and `weight` W are `r x width`, `bias` b is `r`. Arithmetic in float32 (float64 for a float64 h).
    Identity start: W = R, b = 0. Source: arXiv 2404.03592, equation 2.
    """

    tensors = ("weight", "bias")

    def check_options(self) -> None:
        """Refuse what this method cannot do."""
        if self.init == "identity" and not self.is_linear:
            raise ReftuneError(
                f"init='identity' with act_fn={self.act_fn!r}: a(Wh + b) cannot equal Rh for every h; "
                "use init='paper', or act_fn=None"
            )

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """**Overwrites every parameter** with its initial value."""
        self.reset_rotation()
        if self.init == "identity":
            self.weight.copy_(self.rotation)
            self.bias.zero_()
        else:
            init_linear_(self.weight, self.bias)

    @torch.no_grad()
    def start_at(self, vector: Float[Tensor, " width"]) -> None:
        """**Overwrites every parameter**: W = R, and b writes the vector along R's first row.

        Raises:
            ReftuneError: an activation function, behind which no W and b stand for a constant.
        """
        if not self.is_linear:
            raise ReftuneError(f"act_fn={self.act_fn!r}: loreft starts from a direction only without; leave act_fn out")
        self.point_to(vector)
        self.weight.copy_(self.rotation)
        self.bias.copy_(self.rotation @ vector.to(self.rotation))

    def coordinates(self, h: Float[Tensor, "*rows width"]) -> tuple[Float[Tensor, "*rows r"], Float[Tensor, "r width"]]:
        """a(Wh + b) - Rh, along R; linear, it is (W - R)h + b, which is exactly zero where W = R."""
        if self.is_linear:
            W, b, R = self.factors(h.dtype)
            return F.linear(h, W, b), R
        R = self.current_rotation(h.dtype)
        return self.activate(F.linear(h, self.weight.to(h.dtype), self.bias.to(h.dtype))) - F.linear(h, R), R

    def factors(self, dtype: torch.dtype) -> Factors:
        """W - R, b and R."""
        R = self.current_rotation(dtype)
        return self.weight.to(dtype) - R, self.bias.to(dtype), R
