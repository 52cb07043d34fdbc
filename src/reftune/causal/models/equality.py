"""Hierarchical equality: (w = x) = (y = z)."""

from __future__ import annotations

import operator
import random

from reftune.causal.model import CausalModel, Setting, Variable
from reftune.errors import ReftuneError


def hierarchical_equality(entities: int = 100) -> CausalModel:
    """Inputs ``w x y z``; ``left`` is w = x, ``right`` is y = z, and ``same`` is left = right.

    Each equality holds in half of the draws. Source: Geiger et al., arXiv 2303.02536, section 4.1.

    Args:
        entities: inputs are numbers from 0 up to this.
    """
    if entities < 2:
        raise ReftuneError(f"entities={entities}: at least two are needed for anything to differ")
    numbers, truth = tuple(range(entities)), (False, True)

    def sample(rng: random.Random) -> Setting:
        values: list[int] = []
        for _ in range(2):
            first, other = rng.sample(numbers, 2)
            values += [first, first if rng.random() < 0.5 else other]
        return dict(zip("wxyz", values, strict=True))

    return CausalModel(
        [
            *(Variable(name, values=numbers) for name in "wxyz"),
            Variable("left", operator.eq, ("w", "x"), truth),
            Variable("right", operator.eq, ("y", "z"), truth),
            Variable("same", operator.eq, ("left", "right"), truth),
        ],
        sample,
    )
