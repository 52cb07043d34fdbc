"""`SweepRecipe`: what a sweep trains, what it varies, and how long; read from YAML and checked as a whole."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from reftune.errors import ReftuneError
from reftune.runs.recipe import TrainRecipe, field_type, recipe_fields
from reftune.runs.recipe_values import check_names, read_yaml
from reftune.sweeps.space import Choices, Range, Space, label_of, read_range
from reftune.training.arguments import no_type_check

_NOT_IN_A_SWEEP = ("metric", "resume", "show")
"""Fields of TrainRecipe that a sweep has otherwise or not at all."""
_NOT_SEARCHED = {
    "task": "every trial must do the same task",
    "glue": "every trial must do the same task",
    "labels": "every trial must do the same task",
    "eval_file": "every trial must be judged by the same rows",
    "eval_fraction": "every trial must be judged by the same rows",
    "split_eval": "every trial must be judged by the same rows",
    "test_file": "every trial must be judged by the same rows",
    "output": "the sweep chooses each trial's folder",
    "overwrite": "it says what one call does",
    "tensorboard": "it says how a run is watched",
    "wandb": "it says how a run is watched",
    "log_every": "it says how a run is watched",
}


def _option(default: Any, text: str, unit: str = "", aka: tuple[str, ...] = ()) -> Any:
    return field(default=default, metadata={"group": "Sweep", "help": text, "unit": unit, "aka": aka})


@no_type_check  # it takes what YAML and a command line give, and makes it the declared type itself
@dataclass(frozen=True)
class SweepOptions:
    """How a sweep goes on; validated when made.

    Raises:
        ReftuneError: naming the field, its value and the way out.
    """

    trials: int = _option(30, "Trainings in all, those of earlier calls with this output included.", "trials")
    timeout: float | None = _option(
        None, "Begin no further trial after this time; default: none.", "minutes", ("time_limit",)
    )
    metric: Literal["eval_loss"] = _option(
        "eval_loss", "What is to be low: eval_loss (nats per completion token, best epoch).", aka=("objective",)
    )
    sampler: Literal["tpe", "random"] = _option("tpe", "How settings are chosen: learn from earlier trials, or chance.")
    pruner: Literal["median", "none"] = _option(
        "median", "Stop a trial whose epoch is worse than the median of earlier trials' same epoch, or none."
    )

    def __post_init__(self) -> None:
        for name in ("metric", "sampler", "pruner"):
            value, choices = getattr(self, name), get_args(get_type_hints(SweepOptions)[name])
            if name == "pruner" and (value is None or value is False):  # what YAML makes of `no` and `null`
                object.__setattr__(self, name, "none")
            elif value not in choices:
                raise ReftuneError(f"{name}={value!r}: choose {' or '.join(choices)}.")
        object.__setattr__(self, "trials", _number("trials", self.trials, "trials", whole=True))
        if self.timeout is not None:
            object.__setattr__(self, "timeout", _number("timeout", self.timeout, "minutes", whole=False))


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


def sweep_option_fields() -> list[Field[Any]]:
    """A sweep's own options, then those of TrainRecipe that it has too."""
    return [*fields(SweepOptions), *(item for item in recipe_fields() if item.name not in _NOT_IN_A_SWEEP)]


def sweep_field_type(item: Field[Any]) -> Any:
    """A field's type, as an object."""
    own = get_type_hints(SweepOptions)
    return own[item.name] if item.metadata["group"] == "Sweep" else field_type(item)


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
    where = f"recipe {path}"
    items = sweep_option_fields()
    check_names(values, {**{item.name: item.metadata["aka"] for item in items}, "search": ("space",)}, where)
    given = {name: value for name, value in (flags or {}).items() if value is not None}
    search = values.pop("search", None)
    if not isinstance(search, Mapping) or not search:
        raise ReftuneError(f"{where}: search: name what is varied, for instance `search: {{rank: [1, 4, 16]}}`.")
    search = {str(name): value for name, value in search.items()}
    merged: dict[str, Any] = {**values, **given}
    for one, other in (("eval_file", "eval_fraction"), ("eval_fraction", "eval_file")):
        if one in given and other not in given:
            merged.pop(other, None)
    own = {item.name for item in fields(SweepOptions)}
    options = _told(where, lambda: SweepOptions(**{name: merged[name] for name in merged if name in own}))
    fixed = {name: value for name, value in merged.items() if name not in own}
    _check_searched(search, fixed, where)
    first = {name: _first(name, spec, where) for name, spec in search.items()}
    base = _told(where, lambda: TrainRecipe(**{**fixed, **first}))
    space = {name: _options(base, name, spec, where) for name, spec in search.items()}
    first = {name: next(iter(o.values.values())) if isinstance(o, Choices) else o.low for name, o in space.items()}
    base = replace(base, **first)
    _check_judged(base, space, where)
    return SweepRecipe(base, space, options, search, path)


def _check_searched(search: Mapping[str, Any], fixed: Mapping[str, Any], where: str) -> None:
    searchable = {
        i.name: i.metadata["aka"] for i in recipe_fields() if i.name not in (*_NOT_IN_A_SWEEP, *_NOT_SEARCHED)
    }
    for name in search:
        if name in _NOT_SEARCHED:
            raise ReftuneError(f"{where}: search.{name} cannot be searched: {_NOT_SEARCHED[name]}.")
        if name in fixed:
            raise ReftuneError(f"{where}: {name}={fixed[name]!r} is fixed and searched too; leave one of the two out.")
    check_names(search, searchable, f"{where}: search")


def _first(name: str, spec: Any, where: str) -> Any:
    if isinstance(spec, Mapping):
        return spec.get("low", spec.get("high"))
    if not isinstance(spec, list):
        raise ReftuneError(f"{where}: search.{name}={spec!r}: give a list of values, or {{low: ..., high: ...}}.")
    if not spec:
        raise ReftuneError(f"{where}: search.{name}=[]: give at least one value, or leave {name} out of the search.")
    return spec[0]


def _options(base: TrainRecipe, name: str, spec: Any, where: str) -> Choices | Range:
    def read(value: Any) -> Any:
        found = _told(f"{where}: search", lambda: replace(base, **{name: value}))
        return getattr(found, name)

    if isinstance(spec, Mapping):
        kind = type(getattr(base, name))
        if kind not in (int, float) or name in ("layers",):
            raise ReftuneError(f"{where}: search.{name}: only numbers have a range; give a list of values.")
        return _told(where, lambda: read_range(name, spec, kind is int, read))
    found: dict[Any, Any] = {}
    for value in map(read, spec):
        if label_of(value) in found:
            raise ReftuneError(f"{where}: search.{name}: {label_of(value)!r} is there twice.")
        found[label_of(value)] = value
    return Choices(found)


def _check_judged(base: TrainRecipe, space: Space, where: str) -> None:
    if base.task != "completion":
        raise ReftuneError(f"{where}: task={base.task!r}: sweeps are for completions; leave task out.")
    if not base.eval_file and not base.eval_fraction:
        raise ReftuneError(
            f"{where}: there are no rows to judge a trial by: give eval_file: FILE, or eval_fraction: 0.1."
        )
    for name in ("seed", "limit_rows", "train_file", "split", "columns"):
        if base.eval_fraction and name in space:
            raise ReftuneError(
                f"{where}: search.{name} would change the rows that eval_fraction holds out, so that trials could not "
                "be compared; give an eval_file."
            )
    if "limit_rows" in space or "columns" in space:
        raise ReftuneError(f"{where}: search.limit_rows and search.columns would change the held-out rows as well.")


def _told(where: str, make: Any) -> Any:
    """What `make` returns; its errors begin with where the fault is."""
    try:
        return make()
    except ReftuneError as error:
        text = str(error)
        raise ReftuneError(text if text.startswith(where) else f"{where}: {text}") from None


def _number(name: str, value: Any, unit: str, whole: bool) -> int | float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    least = number >= 1 if whole else number > 0
    if not least or not math.isfinite(number) or (whole and not number.is_integer()):
        kind = "a whole number of at least 1" if whole else "a number above 0"
        raise ReftuneError(f"{name}={value!r}: give {kind} ({unit}).")
    return int(number) if whole else number
