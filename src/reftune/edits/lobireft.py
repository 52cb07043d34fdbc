"""LobiReFT."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from reftune.edits.base import FoldedEdit, Init
from reftune.edits.registry import register_edit
from reftune.edits.rotated import Parametrization, RotatedEdit
from reftune.errors import ReftuneError


@register_edit("lobireft")
class LobireftEdit(RotatedEdit):
    """h + R^T b: one vector, the same for every h, added to it (a low-rank bias).

    `rotation` R is `r x width`, `bias` b is `r`. Arithmetic in float32 (float64 for a float64 h). Identity start:
    b = 0; `init="paper"` draws b uniform in [0, 1). Source: pyreft.

    Raises:
        ReftuneError: an activation function.
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
        if not self.is_linear:
            raise ReftuneError(f"act_fn={act_fn!r}: lobireft has nothing to activate; leave act_fn out")
        self.bias = nn.Parameter(torch.empty(r))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """**Overwrites every parameter** with its initial value."""
        self.reset_rotation()
        if self.init == "identity":
            self.bias.zero_()
        else:
            self.bias.uniform_()

    def coordinates(self, h: Float[Tensor, "*rows width"]) -> tuple[Float[Tensor, "*rows r"], Float[Tensor, "r width"]]:
        """Along R: b for every row."""
        return self.bias.to(h.dtype).expand(*h.shape[:-1], self.r), self.current_rotation(h.dtype)

    @torch.no_grad()
    def fold(self) -> FoldedEdit:
        """A = 0, b = b, B = R."""
        R = self.current_rotation(self.bias.dtype)
        return FoldedEdit(A=torch.zeros_like(R.mT), b=self.bias.clone(), B=R.clone())
