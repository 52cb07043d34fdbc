"""ConsReFT."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from reftune.edits.base import Factors
from reftune.edits.registry import register_edit
from reftune.edits.rotated import RotatedEdit
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

    tensors = ("bias",)
    default_init = "paper"

    def check_options(self) -> None:
        """Refuse what this method cannot do."""
        if self.init == "identity":
            raise ReftuneError(
                "init='identity' with method='consreft': it sets h to a constant in r directions, "
                "which is the identity for no constant; use init='paper'"
            )
        if not self.is_linear:
            raise ReftuneError(f"act_fn={self.act_fn!r}: consreft has nothing to activate; leave act_fn out")

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """**Overwrites every parameter** with its initial value."""
        self.reset_rotation()
        self.bias.uniform_()

    def coordinates(self, h: Float[Tensor, "*rows width"]) -> tuple[Float[Tensor, "*rows r"], Float[Tensor, "r width"]]:
        """Along R: b - Rh."""
        R = self.current_rotation(h.dtype)
        return self.bias.to(h.dtype) - F.linear(h, R), R

    def factors(self, dtype: torch.dtype) -> Factors:
        """-R, b and R."""
        R = self.current_rotation(dtype)
        return -R, self.bias.to(dtype), R
