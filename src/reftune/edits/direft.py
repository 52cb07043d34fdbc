"""DiReFT."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from reftune.edits.base import Edit, Factors, Init, init_linear_
from reftune.edits.registry import register_edit


@register_edit("direft", "nodireft")
class DireftEdit(Edit):
    """h + P^T a(Wh + b): a rank-r correction without constraint, as LoRA would make it, on the hidden state.

    `weight` W (the paper's W1) and `projection` P (its W2) are `r x width`, `bias` b is `r`. Arithmetic in float32
    (float64 for a float64 h). Identity start: P = 0. Source: arXiv 2404.03592, equation 3; pyreft calls it Nodireft, so
    that name is known too.
    """

    def __init__(
        self, width: int, r: int, *, dropout: float = 0.0, act_fn: str | None = None, init: Init = "identity"
    ) -> None:
        super().__init__(width, r, dropout=dropout, act_fn=act_fn, init=init)
        self.weight = nn.Parameter(torch.empty(r, width))
        self.bias = nn.Parameter(torch.empty(r))
        self.projection = nn.Parameter(torch.empty(r, width))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """**Overwrites every parameter** with its initial value."""
        init_linear_(self.weight, self.bias)
        if self.init == "identity":
            self.projection.zero_()
        else:
            init_linear_(self.projection)

    @torch.no_grad()
    def start_at(self, vector: Float[Tensor, " width"]) -> None:
        """**Overwrites every parameter**: the first coordinate is the vector's length; the others write nothing."""
        init_linear_(self.weight, self.bias)
        self.projection.zero_()
        self.weight[0], self.bias[0] = 0.0, vector.norm()
        self.projection[0] = vector / self.activate(self.bias)[0]

    def coordinates(self, h: Float[Tensor, "*rows width"]) -> tuple[Float[Tensor, "*rows r"], Float[Tensor, "r width"]]:
        """a(Wh + b), along P."""
        W, b, P = self.factors(h.dtype)
        return self.activate(F.linear(h, W, b)), P

    def factors(self, dtype: torch.dtype) -> Factors:
        """W, b and P."""
        return self.weight.to(dtype), self.bias.to(dtype), self.projection.to(dtype)
