"""DiReFT."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from reftune.edits.base import Edit, FoldedEdit, Init, init_linear_
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

    def coordinates(self, h: Float[Tensor, "*rows width"]) -> tuple[Float[Tensor, "*rows r"], Float[Tensor, "r width"]]:
        """a(Wh + b), along P."""
        read = self.activate(F.linear(h, self.weight.to(h.dtype), self.bias.to(h.dtype)))
        return read, self.projection.to(h.dtype)

    @torch.no_grad()
    def fold(self) -> FoldedEdit:
        """A = W^T, b = b, B = P."""
        self.require_linear()
        return FoldedEdit(A=self.weight.mT.clone(), b=self.bias.clone(), B=self.projection.clone())
