"""NoReFT."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from reftune.edits.base import Edit, Factors, Init, init_linear_
from reftune.edits.registry import register_edit


@register_edit("noreft")
class NoreftEdit(Edit):
    """h + P^T(a(Wh + b) - Ph - c): LoReFT without the constraint, so that no rotation has to be kept.

    `weight` W (the paper's W1) and `projection` P (its W2) are `r x width`, `bias` b is `r`; c is `offset` of size r
    with `add_bias`, else absent. Arithmetic in float32 (float64 for a float64 h). Identity start: W = P, b = c = 0;
    with an activation, P = 0. Source: arXiv 2404.03592, ablations; `add_bias` is pyreft's.
    """

    def __init__(
        self,
        width: int,
        r: int,
        *,
        dropout: float = 0.0,
        act_fn: str | None = None,
        init: Init = "identity",
        add_bias: bool = False,
    ) -> None:
        super().__init__(width, r, dropout=dropout, act_fn=act_fn, init=init)
        self.weight = nn.Parameter(torch.empty(r, width))
        self.bias = nn.Parameter(torch.empty(r))
        self.projection = nn.Parameter(torch.empty(r, width))
        self.offset = nn.Parameter(torch.empty(r)) if add_bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """**Overwrites every parameter** with its initial value."""
        init_linear_(self.projection, self.offset)
        init_linear_(self.weight, self.bias)
        if self.init == "paper":
            return
        if self.offset is not None:
            self.offset.zero_()
        if self.is_linear:
            self.weight.copy_(self.projection)
            self.bias.zero_()
        else:
            self.projection.zero_()

    def coordinates(self, h: Float[Tensor, "*rows width"]) -> tuple[Float[Tensor, "*rows r"], Float[Tensor, "r width"]]:
        """a(Wh + b) - Ph - c, along P; linear, it is (W - P)h + b - c, which is exactly zero where W = P and b = c."""
        if self.is_linear:
            W, b, P = self.factors(h.dtype)
            return F.linear(h, W, b), P
        P, c = self.projection.to(h.dtype), None if self.offset is None else self.offset.to(h.dtype)
        return self.activate(F.linear(h, self.weight.to(h.dtype), self.bias.to(h.dtype))) - F.linear(h, P, c), P

    def factors(self, dtype: torch.dtype) -> Factors:
        """W - P, b - c and P."""
        W, b, P = self.weight.to(dtype), self.bias.to(dtype), self.projection.to(dtype)
        return W - P, b if self.offset is None else b - self.offset.to(dtype), P
