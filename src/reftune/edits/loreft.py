"""LoReFT."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from reftune.edits.base import FoldedEdit, Init, init_linear_
from reftune.edits.registry import register_edit
from reftune.edits.rotated import Parametrization, RotatedEdit
from reftune.errors import ReftuneError


@register_edit("loreft")
class LoreftEdit(RotatedEdit):
    """h + R^T(a(Wh + b) - Rh): within the r directions R, what h reads is replaced by what it should read.

    `rotation` R and `weight` W are `r x width`, `bias` b is `r`. Arithmetic in float32 (float64 for a float64 h).
    Identity start: W = R, b = 0. Source: arXiv 2404.03592, equation 2.
    """

    def __init__(
        self,
        width: int,
        r: int,
        *,
        dropout: float = 0.0,
        act_fn: str | None = None,
        init: Init = "identity",
        parametrization: Parametrization = "cholesky",
    ) -> None:
        super().__init__(width, r, dropout=dropout, act_fn=act_fn, init=init, parametrization=parametrization)
        if init == "identity" and not self.is_linear:
            raise ReftuneError(
                f"init='identity' with act_fn={act_fn!r}: a(Wh + b) cannot equal Rh for every h; "
                "use init='paper', or act_fn=None"
            )
        self.weight = nn.Parameter(torch.empty(r, width))
        self.bias = nn.Parameter(torch.empty(r))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """**Overwrites every parameter** with its initial value."""
        self.reset_rotation()
        if self.init == "identity":
            self.weight.copy_(self.rotation)
            self.bias.zero_()
        else:
            init_linear_(self.weight, self.bias)

    def coordinates(self, h: Float[Tensor, "*rows width"]) -> tuple[Float[Tensor, "*rows r"], Float[Tensor, "r width"]]:
        """a(Wh + b) - Rh, along R; linear, it is (W - R)h + b, which is exactly zero where W = R."""
        R, W, b = self.current_rotation(h.dtype), self.weight.to(h.dtype), self.bias.to(h.dtype)
        if self.is_linear:
            return F.linear(h, W - R, b), R
        return self.activate(F.linear(h, W, b)) - F.linear(h, R), R

    @torch.no_grad()
    def fold(self) -> FoldedEdit:
        """A = (W - R)^T, b = b, B = R."""
        self.require_linear()
        R = self.current_rotation(self.weight.dtype)
        return FoldedEdit(A=(self.weight - R).mT.contiguous(), b=self.bias.clone(), B=R.clone())
