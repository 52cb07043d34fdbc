"""`SweepRecipe`: what a sweep trains, what it varies, and how long; read from YAML and checked as a whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from reftune.errors import ReftuneError
from reftune.runs.recipe import ALONE, TrainRecipe
from reftune.runs.recipe_values import (
    also_known_as,
    check_names,
    coerce_fields,
    merged,
    no_type_check,
    option,
    read_number,
    read_yaml,
    told_at,
    typed_fields,
)
from reftune.sweeps.space import Choices, Range, Space, label_of, read_range

_NOT_IN_A_SWEEP = ("metric", *ALONE)
"""Fields of TrainRecipe that a sweep has otherwise or not at all."""
_NOT_SEARCHED = {
    "task": "every trial must do the same task",
    "glue": "every trial must do the same task",
    "labels": "every trial must do the same task",
    "eval_file": "every trial must be judged by the same rows",
    "eval_fraction": "every trial must be judged by the same rows",
    "split_eval": "every trial must be judged by the same rows",
    "test_file": "every trial must be judged by the same rows",
    "like": "it stands for several settings; search those",
    "budget": "it stands for several settings; search those",
    "output": "the sweep chooses each trial's folder",
    "overwrite": "it says what one call does",
    "tensorboard": "it says how a run is watched",
    "wandb": "it says how a run is watched",
    "log_every": "it says how a run is watched",
}


@no_type_check  # it takes what YAML and a command line give, and makes it the declared type itself
@dataclass(frozen=True)
class SweepOptions:
    """How a sweep goes on; validated when made.

    Raises:
        ReftuneError: naming the field, its value and the way out.
    """

    trials: int = option(30, "Sweep", "Trainings in all, those of earlier calls with this output included.", "trials")
    timeout: float | None = option(
        None, "Sweep", "Begin no further trial after this time; default: none.", "minutes", ("time_limit",)
    )
    metric: Literal["eval_loss"] = option(
        "eval_loss",
        "Sweep",
        "What is to be low: eval_loss (nats per completion token, best epoch).",
        "",
        ("objective",),
    )
    sampler: Literal["tpe", "random"] = option(
        "tpe", "Sweep", "How settings are chosen: learn from earlier trials, or chance."
    )
    pruner: Literal["median", "none"] = option(
        "median", "Sweep", "Stop a trial whose epoch is worse than the median of earlier trials' same epoch, or none."
    )

    def __post_init__(self) -> None:
        if self.pruner is None or self.pruner is False:  # what YAML makes of `no` and `null`
            object.__setattr__(self, "pruner", "none")
        read_number("trials", self.trials, whole=True, least=1, unit="trials")
        if self.timeout is not None:
            read_number("timeout", self.timeout, unit="minutes")
        coerce_fields(self)


@dataclass(frozen=True)
class SweepRecipe:
    """A sweep; made by `resolve_sweep`.

    Attributes:
        base: the settings of all trials, each searched field at its first value; `output` is the sweep's folder.
        space: the searched fields.
        options: how many trials, how long, how chosen.
        search: the `search:` mapping as it was written.
        source: the recipe's file.
    """

    base: TrainRecipe
    space: Space
    options: SweepOptions
    search: Mapping[str, Any]
    source: Path

    def trial(self, settings: Mapping[str, Any], output: str | Path) -> TrainRecipe:
        """What one trial trains.

        Raises:
            ReftuneError: settings that do not go together.
        """
        return replace(self.base, **settings, output=str(output))

    def to_yaml(self) -> str:
        """The sweep as a recipe that `resolve_sweep` reads, flags included, local files by their full path."""
        values: dict[str, Any] = yaml.safe_load(self.base.to_yaml())
        values = {name: value for name, value in values.items() if name not in (*_NOT_IN_A_SWEEP, *self.space)}
        return yaml.safe_dump({**values, **asdict(self.options), "search": dict(self.search)}, sort_keys=False)


def sweep_options() -> list[tuple[Field[Any], Any]]:
    """A sweep's own options, then those of TrainRecipe that it has too, each with its type."""
    return [*typed_fields(SweepOptions), *typed_fields(TrainRecipe, without=_NOT_IN_A_SWEEP)]


def resolve_sweep(path: str | Path, flags: Mapping[str, Any] | None = None) -> SweepRecipe:
    """Make a sweep from a YAML file and flags, which win.

    Args:
        path: a recipe: TrainRecipe's keys, `SweepOptions`' and `search`.
        flags: values by field name; None means "not given".

    Raises:
        ReftuneError: a file that is missing or not YAML, a key that does not exist, a value out of range, no rows to
            judge by.
    """
    path = Path(path).expanduser()
    values = read_yaml(path)
    with told_at(f"recipe {path}"):
        known = also_known_as(SweepOptions) | also_known_as(TrainRecipe, _NOT_IN_A_SWEEP) | {"search": ("space",)}
        check_names(values, known)
        search = values.pop("search", None)
        if not isinstance(search, Mapping) or not search:
            raise ReftuneError("search: name what is varied, for instance `search: {rank: [1, 4, 16]}`.")
        search = {str(name): value for name, value in search.items()}
        fixed = merged(values, flags)
        options = SweepOptions(
            **{item.name: fixed.pop(item.name) for item in fields(SweepOptions) if item.name in fixed}
        )
        _check_searched(search, fixed)
        base = TrainRecipe(**fixed, **{name: _first(name, spec) for name, spec in search.items()})
        space = {name: _options(base, name, spec) for name, spec in search.items()}
        first = {name: next(iter(o.values.values())) if isinstance(o, Choices) else o.low for name, o in space.items()}
        base = replace(base, **first)
        _check_judged(base, space)
    return SweepRecipe(base, space, options, search, path)


def _check_searched(search: Mapping[str, Any], fixed: Mapping[str, Any]) -> None:
    for name in search:
        if name in _NOT_SEARCHED:
            raise ReftuneError(f"search.{name} cannot be searched: {_NOT_SEARCHED[name]}.")
        if name in fixed:
            raise ReftuneError(f"{name}={fixed[name]!r} is fixed and searched too; leave one of the two out.")
    check_names(search, also_known_as(TrainRecipe, {*_NOT_IN_A_SWEEP, *_NOT_SEARCHED}), "search")


def _first(name: str, spec: Any) -> Any:
    if isinstance(spec, Mapping):
        return spec.get("low", spec.get("high"))
    if not isinstance(spec, list):
        raise ReftuneError(f"search.{name}={spec!r}: give a list of values, or {{low: ..., high: ...}}.")
    if not spec:
        raise ReftuneError(f"search.{name}=[]: give at least one value, or leave {name} out of the search.")
    return spec[0]


def _options(base: TrainRecipe, name: str, spec: Any) -> Choices | Range:
    def read(value: Any) -> Any:
        with told_at("search"):
            return getattr(replace(base, **{name: value}), name)

    if isinstance(spec, Mapping):
        kind = type(getattr(base, name))
        if kind not in (int, float) or name == "layers":
            raise ReftuneError(f"search.{name}: only numbers have a range; give a list of values.")
        return read_range(name, spec, kind is int, read)
    found: dict[Any, Any] = {}
    for value in map(read, spec):
        if label_of(value) in found:
            raise ReftuneError(f"search.{name}: {label_of(value)!r} is there twice.")
        found[label_of(value)] = value
    return Choices(found)


def _check_judged(base: TrainRecipe, space: Space) -> None:
    if base.task != "completion":
        raise ReftuneError(f"task={base.task!r}: sweeps are for completions; leave task out.")
    if not base.eval_file and not base.eval_fraction:
        raise ReftuneError("there are no rows to judge a trial by: give eval_file: FILE, or eval_fraction: 0.1.")
    for name in ("seed", "limit_rows", "train_file", "split", "columns"):
        if base.eval_fraction and name in space:
            raise ReftuneError(
                f"search.{name} would change the rows that eval_fraction holds out, so that trials could not be "
                "compared; give an eval_file."
            )
    if "limit_rows" in space or "columns" in space:
        raise ReftuneError("search.limit_rows and search.columns would change the held-out rows as well.")
