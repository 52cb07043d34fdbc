"""Addition of two numbers, digit by digit, with a carry."""

from __future__ import annotations

from reftune.causal.model import CausalModel, Variable
from reftune.errors import ReftuneError


def addition(digits: int = 2) -> CausalModel:
    """Inputs ``a0 a1 ...`` and ``b0 b1 ...``, units first; ``carry0`` is whether a0 + b0 reaches ten, and so on.

    ``sum0 sum1 ...`` are the digits of the result, the last carry is its leading digit, and ``total`` is the number.

    Args:
        digits: of each number.
    """
    if digits < 1:
        raise ReftuneError(f"digits={digits}: a number has at least one")
    ten, bit = tuple(range(10)), (0, 1)
    variables = [Variable(f"{side}{place}", values=ten) for place in range(digits) for side in "ab"]
    for place in range(digits):
        parents = (f"a{place}", f"b{place}", *((f"carry{place - 1}",) if place else ()))
        variables.append(Variable(f"sum{place}", lambda *terms: sum(terms) % 10, parents, ten))
        variables.append(Variable(f"carry{place}", lambda *terms: sum(terms) // 10, parents, bit))
    parents = (*(f"sum{place}" for place in range(digits)), f"carry{digits - 1}")
    variables.append(Variable("total", lambda *found: sum(d * 10**place for place, d in enumerate(found)), parents))
    return CausalModel(variables)
