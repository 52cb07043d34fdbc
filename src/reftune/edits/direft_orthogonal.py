"""DiReFT with an orthonormal projection."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from reftune.edits.activations import starts_at_zero
from reftune.edits.base import FoldedEdit, Init, init_linear_
from reftune.edits.registry import register_edit
from reftune.edits.rotated import Parametrization, RotatedEdit
from reftune.errors import ReftuneError


@register_edit("direft_orthogonal")
class DireftOrthogonalEdit(RotatedEdit):
    """h + R^T a(Wh + b): DiReFT with an orthonormal projection, an ablation and not the paper's DiReFT.

    `rotation` R and `weight` W are `r x width`, `bias` b is `r`. Arithmetic in float32 (float64 for a float64 h).
    Identity start: W = 0, b = 0. Source: pyreft, which calls it Direft.

    Raises:
        ReftuneError: `init="identity"` with an activation that is not zero at zero, or is flat there.
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
        if init == "identity" and not starts_at_zero(self.activate):
            raise ReftuneError(
                f"init='identity' with act_fn={act_fn!r}: the edit starts as the identity and can learn only where "
                "a(0) = 0 and a'(0) is not 0; use init='paper' or another activation, such as 'gelu' or 'tanh'"
            )
        self.weight = nn.Parameter(torch.empty(r, width))
        self.bias = nn.Parameter(torch.empty(r))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """**Overwrites every parameter** with its initial value."""
        self.reset_rotation()
        if self.init == "identity":
            self.weight.zero_()
            self.bias.zero_()
        else:
            init_linear_(self.weight, self.bias)

    def coordinates(self, h: Float[Tensor, "*rows width"]) -> tuple[Float[Tensor, "*rows r"], Float[Tensor, "r width"]]:
        """a(Wh + b), along R."""
        read = self.activate(F.linear(h, self.weight.to(h.dtype), self.bias.to(h.dtype)))
        return read, self.current_rotation(h.dtype)

    @torch.no_grad()
    def fold(self) -> FoldedEdit:
        """A = W^T, b = b, B = R."""
        self.require_linear()
        R = self.current_rotation(self.weight.dtype)
        return FoldedEdit(A=self.weight.mT.clone(), b=self.bias.clone(), B=R.clone())
