"""DiReFT with an orthonormal projection."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from reftune.edits.activations import starts_at_zero
from reftune.edits.base import Factors, init_linear_
from reftune.edits.registry import register_edit
from reftune.edits.rotated import RotatedEdit
from reftune.errors import ReftuneError


@register_edit("direft_orthogonal")
class DireftOrthogonalEdit(RotatedEdit):
    """h + R^T a(Wh + b): DiReFT with an orthonormal projection, an ablation and not the paper's DiReFT.

    `rotation` R and `weight` W are `r x width`, `bias` b is `r`. Arithmetic in float32 (float64 for a float64 h).
    Identity start: W = 0, b = 0. Source: pyreft, which calls it Direft.

    Raises:
        ReftuneError: `init="identity"` with an activation that is not zero at zero, or is flat there.
    """

    tensors = ("weight", "bias")

    def check_options(self) -> None:
        """Refuse what this method cannot do."""
        if self.init == "identity" and not starts_at_zero(self.activate):
            raise ReftuneError(
                f"init='identity' with act_fn={self.act_fn!r}: the edit starts as the identity and can learn only "
                "where a(0) = 0 and a'(0) is not 0; use init='paper' or another activation, such as 'gelu' or 'tanh'"
            )

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
        W, b, R = self.factors(h.dtype)
        return self.activate(F.linear(h, W, b)), R

    def factors(self, dtype: torch.dtype) -> Factors:
        """W, b and R."""
        return self.weight.to(dtype), self.bias.to(dtype), self.current_rotation(dtype)
