"""Counterfactual datasets: base inputs, a source for each interchanged variable, and what the model then says."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from reftune.causal.model import CausalModel, Setting
from reftune.errors import ReftuneError

_TRIES = 10_000


@dataclass(frozen=True)
class Counterfactual:
    """One example of an interchange.

    Attributes:
        base: inputs of the base run.
        sources: inputs of a source run for each interchanged variable (none for a plain run).
        base_setting: all values of the base run.
        setting: all values after the interchange.
    """

    base: Setting
    sources: dict[str, Setting]
    base_setting: Setting
    setting: Setting


def counterfactuals(
    model: CausalModel,
    count: int,
    variables: Collection[str],
    *,
    together: bool = True,
    changed: float = 0.5,
    seed: int = 0,
    keep: Callable[[Counterfactual], bool] | None = None,
) -> list[Counterfactual]:
    """Draw examples in which a random non-empty subset of ``variables`` is interchanged.

    Args:
        model: the causal model.
        count: number of examples.
        variables: the variables that may be interchanged.
        together: whether several variables may be interchanged in one example; otherwise one at a time.
        changed: at least this share of the examples has an interchange that changes an output. Without it a network
            that ignores the interchange would score well.
        seed: of the draws.
        keep: an example is drawn again where this is false.

    Raises:
        ReftuneError: no variable, an unknown one, or conditions that 10,000 draws do not meet.
    """
    names = list(variables)
    if not names:
        raise ReftuneError("variables=[]: name at least one variable to interchange")
    for name in names:
        model._require(name)
    rng = random.Random(seed)
    found: list[Counterfactual] = []
    for index in range(count):
        must_change = index < round(changed * count)
        for _ in range(_TRIES):
            example = _draw(model, names, together, rng)
            differs = any(example.setting[name] != example.base_setting[name] for name in model.outputs)
            if (differs or not must_change) and (keep is None or keep(example)):
                found.append(example)
                break
        else:
            raise ReftuneError(f"no draw in {_TRIES} met the conditions (changed={changed}, keep={keep}): relax them")
    rng.shuffle(found)
    return found


def _draw(model: CausalModel, names: Sequence[str], together: bool, rng: random.Random) -> Counterfactual:
    size = rng.randint(1, len(names)) if together else 1
    chosen = rng.sample(names, size)
    base = model.sample(rng)
    sources = {name: model.sample(rng) for name in names if name in chosen}
    return Counterfactual(base, sources, model.run(base), model.interchange(base, sources))


def factual(model: CausalModel, count: int, seed: int = 0) -> list[Setting]:
    """Settings of plain runs, to train a network on: inputs and outputs of ``count`` draws."""
    rng = random.Random(seed)
    return [model.run(model.sample(rng)) for _ in range(count)]


def majority_share(examples: Iterable[Counterfactual], output: str) -> float:
    """How often the most frequent output occurs: the accuracy of a constant answer, which an IIA must beat."""
    outcomes: dict[Any, int] = {}
    for example in examples:
        outcomes[example.setting[output]] = outcomes.get(example.setting[output], 0) + 1
    return max(outcomes.values()) / sum(outcomes.values())
