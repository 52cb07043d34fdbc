"""What a sweep varies: a list of choices or a range for each searched field."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from reftune.errors import ReftuneError
from reftune.runs.recipe_values import check_names, read_number, told_at

Label = str | int | float | bool | None
"""What the study stores of a value: Optuna's choices are scalars, so that a list of layers is written out."""

_SHARED_BY_PLACE = (
    "model", "dtype", "quantization", "template", "system_prompt", "chat_template_kwargs", "max_length", "positions",
    "layers", "component",
)  # fmt: skip
"""Fields that decide what trials can take from each other's prefix store."""


@dataclass(frozen=True)
class Choices:
    """One of several values, by label, in the order of the recipe."""

    values: Mapping[Label, Any]

    def suggest(self, trial: Any, name: str) -> Any:
        """The value that the sampler chooses for a trial."""
        return self.values[trial.suggest_categorical(name, list(self.values))]

    def draw(self, rng: random.Random) -> Label:
        """A label at random."""
        return rng.choice(list(self.values))


@dataclass(frozen=True)
class Range:
    """A number between two, both included; `log`: every ratio is as likely as another."""

    low: int | float
    high: int | float
    log: bool
    step: int | float | None
    whole: bool

    def suggest(self, trial: Any, name: str) -> int | float:
        """The value that the sampler chooses for a trial."""
        if self.whole:
            step = 1 if self.step is None else int(self.step)
            return trial.suggest_int(name, int(self.low), int(self.high), step=step, log=self.log)
        return trial.suggest_float(name, self.low, self.high, step=self.step, log=self.log)

    def draw(self, rng: random.Random) -> int | float:
        """A value at random."""
        if self.log:
            found = math.exp(rng.uniform(math.log(self.low), math.log(self.high)))
        else:
            found = rng.uniform(self.low, self.high)
        step = self.step or (1 if self.whole else None)
        if step is not None:
            found = self.low + round((found - self.low) / step) * step
            found = found if found <= self.high else found - step
        found = min(max(found, self.low), self.high)
        return round(found) if self.whole else found


Space = Mapping[str, Choices | Range]


def label_of(value: Any) -> Label:
    """How a value is stored and shown: `10,14,18,22` for a list of layers."""
    if isinstance(value, (list, tuple)):
        return ",".join(str(part) for part in value)
    if isinstance(value, Mapping):
        return ",".join(f"{name}={part}" for name, part in value.items())
    return value


def read_range(name: str, given: Mapping[Any, Any], whole: bool, read: Any) -> Range:
    """A range from `{low: 1e-4, high: 1e-2, log: true}`.

    Args:
        name: the searched field.
        given: `low` and `high`, and where wanted `log` or `step`.
        whole: whether the field is a whole number.
        read: makes a value of the field's type, or raises `ReftuneError`.

    Raises:
        ReftuneError: a key that does not exist or is missing, bounds in the wrong order, a step that fits nothing.
    """
    where = f"search.{name}"
    check_names(map(str, given), {"low": ("min",), "high": ("max",), "log": (), "step": ()}, where)
    for bound in ("low", "high"):
        if given.get(bound) is None:
            raise ReftuneError(f"{where}: {bound} is missing; write {{low: ..., high: ...}}, or a list of values.")
    low, high = read(given["low"]), read(given["high"])
    if not low < high:
        raise ReftuneError(f"{where}: low={low:g} must be below high={high:g}.")
    log = given.get("log", False)
    if not isinstance(log, bool):
        raise ReftuneError(f"{where}: log={log!r}: write true or false.")
    if log and low <= 0:
        raise ReftuneError(f"{where}: low={low:g} must be above 0 where log is true.")
    step = given.get("step")
    if step is not None:
        with told_at(where):
            step = float(read_number("step", step, whole=whole, least=1 if whole else None))
        if log or step > high - low:
            raise ReftuneError(f"{where}: step={step:g}: give at most {high - low:g}, and none with log.")
    return Range(low, high, log, step, whole)


def draw_distinct(
    space: Space, count: int, rng: random.Random, taken: set[tuple[Label, ...]]
) -> list[dict[str, Label]]:
    """Random settings, each once, ordered so that those which edit at the same place follow each other.

    Args:
        space: what is searched.
        count: how many are wanted; there are fewer where the space has no more.
        rng: where chance comes from.
        taken: settings not to draw, as `settings_key` writes them; **drawn ones are added**.
    """
    found: list[dict[str, Label]] = []
    for _ in range(100 * count):
        if len(found) == count:
            break
        drawn: dict[str, Label] = {name: options.draw(rng) for name, options in space.items()}
        key = settings_key(space, drawn)
        if key not in taken:
            taken.add(key)
            found.append(drawn)
    return sorted(found, key=lambda drawn: _place(space, drawn))


def settings_key(space: Space, labels: Mapping[str, Any]) -> tuple[Label, ...]:
    """Settings as one value that can be looked up."""
    return tuple(labels[name] for name in space)


def _place(space: Space, drawn: Mapping[str, Label]) -> tuple[Any, ...]:
    found = []
    for name in _SHARED_BY_PLACE:
        options = space.get(name)
        if isinstance(options, Choices):
            found.append(list(options.values).index(drawn[name]))
        elif options is not None:
            found.append(drawn[name])
    return tuple(found)
