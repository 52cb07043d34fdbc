"""ConsReFT."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from reftune.edits.base import FoldedEdit, Init
from reftune.edits.registry import register_edit
from reftune.edits.rotated import Parametrization, RotatedEdit
from reftune.errors import ReftuneError


@register_edit("consreft")
class ConsreftEdit(RotatedEdit):
    """h + R^T(b - Rh): whatever h reads within the r directions R, it reads the constant b from now on.

    `rotation` R is `r x width`, `bias` b is `r`. Arithmetic in float32 (float64 for a float64 h). It cannot start as
    the identity, since no constant equals Rh for every h: `init` must be `"paper"`, b uniform in [0, 1).
    Source: pyreft.

    Raises:
        ReftuneError: `init="identity"`, or an activation function.
    """

    def __init__(
        self,
        width: int,
        r: int,
        *,
        dropout: float = 0.0,
        act_fn: str | None = None,
        init: Init = "paper",
        parametrization: Parametrization = "cholesky",
    ) -> None:
        super().__init__(width, r, dropout=dropout, act_fn=act_fn, init=init, parametrization=parametrization)
        if init == "identity":
            raise ReftuneError(
                "init='identity' with method='consreft': it sets h to a constant in r directions, "
                "which is the identity for no constant; use init='paper'"
            )
        if not self.is_linear:
            raise ReftuneError(f"act_fn={act_fn!r}: consreft has nothing to activate; leave act_fn out")
        self.bias = nn.Parameter(torch.empty(r))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """**Overwrites every parameter** with its initial value."""
        self.reset_rotation()
        self.bias.uniform_()

    def coordinates(self, h: Float[Tensor, "*rows width"]) -> tuple[Float[Tensor, "*rows r"], Float[Tensor, "r width"]]:
        """Along R: b - Rh."""
        R = self.current_rotation(h.dtype)
        return self.bias.to(h.dtype) - F.linear(h, R), R

    @torch.no_grad()
    def fold(self) -> FoldedEdit:
        """A = -R^T, b = b, B = R."""
        R = self.current_rotation(self.bias.dtype)
        return FoldedEdit(A=(-R).mT.contiguous(), b=self.bias.clone(), B=R.clone())
