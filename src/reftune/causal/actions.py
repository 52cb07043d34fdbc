"""What an intervention does to the hidden states at its location, one function each: (states, sources) -> states."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from reftune.errors import ReftuneError

Action = Callable[..., Tensor]
"""Takes states (units, width) and one tensor (units, ...) for each source, and returns states (units, width)."""


@dataclass(frozen=True, eq=False)
class Subspace:
    """The span of ``size`` orthonormal directions, within which a swap takes place.

    Attributes:
        rotation: (size, width), its rows orthonormal.

    Raises:
        ReftuneError: more directions than the width, or rows that are not orthonormal.
    """

    rotation: Float[Tensor, "size width"]

    def __post_init__(self) -> None:
        size, width = self.rotation.shape
        if size > width:
            raise ReftuneError(f"a subspace of {size} directions is larger than the hidden size {width}")
        product = self.rotation.double() @ self.rotation.double().mT
        if not torch.allclose(product, torch.eye(size, dtype=product.dtype, device=product.device), atol=1e-4):
            raise ReftuneError("the rows of a subspace's rotation must be orthonormal (torch.linalg.qr makes them so)")

    @staticmethod
    def of_neurons(neurons: list[int], width: int) -> Subspace:
        """The subspace of some channels of the hidden state."""
        if wrong := [n for n in neurons if not 0 <= n < width]:
            raise ReftuneError(f"neurons={wrong}: the hidden state has {width}, 0 to {width - 1}")
        return Subspace(torch.eye(width)[neurons])


@dataclass(frozen=True, eq=False)
class SwapIn:
    """h + R^T(Rs - Rh): within the subspace, what the source has; without one, the source's state itself.

    Source: arXiv 2303.02536, equation 3 (distributed interchange intervention).
    """

    subspace: Subspace | None = None

    def __call__(
        self, h: Float[Tensor, "units width"], s: Float[Tensor, "units width"]
    ) -> Float[Tensor, "units width"]:
        """The states with the source's part in them."""
        if self.subspace is None:
            return s.to(h.dtype)
        R = self.subspace.rotation.to(h)
        if R.shape[1] != h.shape[1]:
            raise ReftuneError(f"a subspace of width {R.shape[1]} does not fit a hidden state of width {h.shape[1]}")
        return h + ((s.to(h.dtype) - h) @ R.mT) @ R


@dataclass(frozen=True)
class Fill:
    """Every state becomes the same vector, zero by default."""

    vector: Float[Tensor, " width"] | float = 0.0

    def __call__(self, h: Float[Tensor, "units width"]) -> Float[Tensor, "units width"]:
        """The filled states."""
        return torch.as_tensor(self.vector, dtype=h.dtype, device=h.device).expand_as(h)


@dataclass(frozen=True)
class Add:
    """h + scale * vector."""

    vector: Float[Tensor, " width"]
    scale: float = 1.0

    def __call__(self, h: Float[Tensor, "units width"]) -> Float[Tensor, "units width"]:
        """The shifted states."""
        return h + self.scale * self.vector.to(h)


@dataclass(frozen=True)
class AddNoise:
    """h + std * e, with e standard normal: the same draw in every forward of equal shape, from its own seed."""

    std: float
    seed: int = 0

    def __call__(self, h: Float[Tensor, "units width"]) -> Float[Tensor, "units width"]:
        """The noisy states."""
        noise = torch.randn(h.shape, generator=torch.Generator().manual_seed(self.seed))
        return h + self.std * noise.to(h)


def keep(h: Float[Tensor, "units width"]) -> Float[Tensor, "units width"]:
    """Change nothing: a location is only read."""
    return h
