"""Price tagging: is an amount within a bracket?"""

from __future__ import annotations

import random

from reftune.causal.model import CausalModel, Setting, Variable


def price_tagging(
    highest: int = 999, least_gap: int = 250, greatest_gap: int = 750, verdict: bool = False
) -> CausalModel:
    """Inputs ``low``, ``high`` and ``amount`` in cents; ``enough`` is amount >= low, ``affordable`` amount <= high.

    The output ``inside`` is both, or with ``verdict`` the output is ``"below"``, ``"inside"`` or ``"above"``. Below,
    within and above the bracket are drawn equally often. Source: Wu et al., "Interpretability at Scale: Identifying
    Causal Mechanisms in Alpaca" (arXiv 2305.08809), section 4.

    Args:
        highest: the greatest amount, in cents.
        least_gap: between the bracket's bounds, at least.
        greatest_gap: at most.
        verdict: whether the output tells on which side an amount lies outside.
    """

    def sample(rng: random.Random) -> Setting:
        low = rng.randint(1, highest - least_gap - 1)
        high = low + rng.randint(least_gap, min(greatest_gap, highest - low - 1))
        bounds = rng.choice([(0, low - 1), (low, high), (high + 1, highest)])
        return {"low": low, "high": high, "amount": rng.randint(*bounds)}

    truth = (False, True)
    both = ("enough", "affordable")
    output = Variable("inside", lambda enough, affordable: enough and affordable, both, truth)
    if verdict:
        output = Variable(
            "verdict",
            lambda enough, affordable: "below" if not enough else "inside" if affordable else "above",
            both,
            ("below", "inside", "above"),
        )
    return CausalModel(
        [
            Variable("low"),
            Variable("high"),
            Variable("amount"),
            Variable("enough", lambda amount, low: amount >= low, ("amount", "low"), truth),
            Variable("affordable", lambda amount, high: amount <= high, ("amount", "high"), truth),
            output,
        ],
        sample,
    )


def price_question(inputs: Setting) -> str:
    """The inputs as a question whose answer is Yes or No."""
    low, high, amount = (f"{inputs[name] / 100:.2f}" for name in ("low", "high", "amount"))
    return f"Please say yes only if it costs between {low} and {high} dollars, otherwise no. It costs {amount} dollars."
