"""`CompareRecipe`: which methods are compared, on what, with which seeds; read from YAML and checked as a whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from reftune.comparison.methods import Method, read_method
from reftune.errors import ReftuneError
from reftune.evaluation.judging import full_source
from reftune.runs.known_settings import AUTO
from reftune.runs.recipe import ALONE, DIALS, TrainRecipe, adapter_keys
from reftune.runs.recipe_values import also_known_as, check_names, merged, read_number, read_yaml, told_at

RECIPE_FILE = "comparison.yaml"
JUDGED_BY = ("final", "best")
FILES = ("options", "refusal_file", "neutral_file")
"""Keys that name files beside those of the rows."""

_OWN: Mapping[str, tuple[str, ...]] = {
    "methods": ("runs", "adapters"),
    "seeds": ("seed_list",),
    "generate": ("generation", "prompts"),
    "max_new_tokens": ("max_tokens",),
    "options": ("option_file", "options_file"),
    "side_effects": (),
    "refusal_file": ("refusals",),
    "neutral_file": (),
    "reference": ("baseline",),
    "judge": (),
    "judge_by": (),
    "title": ("name",),
}
_ONE_RUN = (*ALONE, "overwrite", "tensorboard", "wandb", "log_every")
"""Keys of TrainRecipe that say how one run is watched; a comparison has its own ways."""


@dataclass(frozen=True)
class CompareRecipe:
    """What is compared; made by `resolve_comparison`.

    Attributes:
        shared: the settings of all methods; its `seed` decides which rows are held out, `output` is the folder.
        methods: in the order of the recipe.
        seeds: each method is trained with each; a seed decides initialisation, row order and dropout.
        generate: held-out rows to answer (0: none; -1: all), for exact match and answers side by side.
        max_new_tokens: length of an answer, in tokens.
        options: file of rows with options, for option accuracy.
        side_effects: whether to measure them (see `evaluation.side_effects`).
        refusal_file: prompts labelled harmless or harmful, for shares of refusals.
        neutral_file: prompts with plain answers, for forgetting and divergence; those of the package where None.
        reference: the method that the others are tested against.
        judge: accepts answers or does not (see `evaluation.judging`); None: nobody is asked.
        judge_by: `final` (loss after the last epoch) or `best` (of the epochs).
        title: of the report.
        given: the recipe as it was written, for `comparison.yaml`.
    """

    shared: TrainRecipe
    methods: tuple[Method, ...]
    seeds: tuple[int, ...]
    generate: int
    max_new_tokens: int
    options: str | None
    side_effects: bool
    refusal_file: str | None
    neutral_file: str | None
    reference: str
    judge: str | None
    judge_by: str
    title: str
    given: Mapping[str, Any]

    @property
    def folder(self) -> Path:
        """Where everything is written."""
        return Path(self.shared.output).expanduser()

    def method(self, name: str) -> Method:
        """A method by name.

        Raises:
            ReftuneError: there is none of that name.
        """
        names = {method.name: method for method in self.methods}
        check_names([name], dict.fromkeys(names, ()), "methods", "name")
        return names[name]

    def runs(self) -> list[tuple[Method, int]]:
        """Every (method, seed), seed by seed, so that a broken-off comparison has every method at the first seeds.

        What no seed changes, the base model above all, is evaluated once.
        """
        return [
            (method, seed)
            for index, seed in enumerate(self.seeds)
            for method in self.methods
            if method.seeded or index == 0
        ]

    def to_yaml(self) -> str:
        """The recipe with local files by their full path, ready to run again anywhere."""
        values = dict(self.given)
        for name in ("train_file", "eval_file", "model"):
            if getattr(self.shared, name):
                values[name] = self.shared.full_path(name)
        values["output"] = str(self.folder.resolve())
        for name in FILES:
            if path := getattr(self, name):
                values[name] = str(Path(path).expanduser().resolve())
        if self.judge:
            values["judge"] = full_source(self.judge)
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120)


def resolve_comparison(
    source: str | Path | Mapping[str, Any],
    flags: Mapping[str, Any] | None = None,
    *,
    more: Mapping[str, Any] | None = None,
) -> CompareRecipe:
    """Make a comparison from a YAML file or a mapping, and flags, which win.

    Args:
        source: a recipe, the folder of an earlier comparison, or the recipe's content.
        flags: values by key; None means "not given".
        more: methods beside those of the recipe, in place of those with the same names.

    Raises:
        ReftuneError: a file that is missing or not YAML, an unknown key, a value out of range.
    """
    where = "recipe"
    if isinstance(source, Mapping):
        values = {str(key): value for key, value in source.items()}
    else:
        path = Path(source).expanduser()
        path = path / RECIPE_FILE if path.is_dir() else path
        values, where = read_yaml(path), f"recipe {path}"
    with told_at(where):
        if more and isinstance(entries := values.get("methods"), Mapping):
            values["methods"] = {**entries, **more}
        return _checked(merged(values, flags))


def _checked(values: dict[str, Any]) -> CompareRecipe:
    adapter = adapter_keys()
    top = also_known_as(TrainRecipe, {*adapter, *DIALS, *_ONE_RUN})
    for key in values:
        if key in (*adapter, *DIALS):
            raise ReftuneError(f"{key!r} belongs to a method; write it under its name in `methods`.")
        if key in _ONE_RUN:
            raise ReftuneError(f"{key!r} is a key of one training run, not of a comparison; leave it out.")
    check_names(values, {**_OWN, **top})
    entries = values.get("methods")
    if not isinstance(entries, Mapping) or not entries:
        raise ReftuneError(f"methods={entries!r}: write at least one `name: {{method: loreft, ...}}`.")
    shared: dict[str, Any] = {name: value for name, value in values.items() if name in top} | {"tensorboard": False}
    shared.setdefault("output", "comparison")
    recipe = TrainRecipe(**shared)
    if recipe.task != "completion":
        raise ReftuneError(f"task={recipe.task!r}: completions are compared; classifiers are not.")
    if recipe.batch_size == AUTO:
        raise ReftuneError("batch_size='auto' is for one run, not for a comparison: give a number of rows.")
    if not recipe.eval_file and not recipe.eval_fraction:
        raise ReftuneError("methods are judged on held-out rows: give eval_file, or eval_fraction: 0.1.")
    with told_at("methods"):
        methods = [read_method(str(name), entry, shared) for name, entry in entries.items()]
    _check_distinct_folders(methods)
    judged = values.get("judge_by", "final")
    files = {name: None if values.get(name) is None else str(values[name]) for name in FILES}
    side_effects = values.get("side_effects", False)
    judge = None if values.get("judge") is None else str(values["judge"])
    if judged not in JUDGED_BY:
        raise ReftuneError(f"judge_by={judged!r}: choose {' or '.join(JUDGED_BY)}.")
    for name, path in files.items():
        if path is not None and not Path(path).expanduser().is_file():
            raise ReftuneError(f"{name}={path!r}: there is no such file.")
    if not isinstance(side_effects, bool):
        raise ReftuneError(f"side_effects={side_effects!r}: write true or false.")
    if judge is not None and not _generate(values.get("generate", True)):
        raise ReftuneError(f"judge={judge!r}: nothing is answered, so nothing is judged; leave generate out.")
    return CompareRecipe(
        shared=recipe,
        methods=tuple(methods),
        seeds=_seeds(values.get("seeds", [0])),
        generate=_generate(values.get("generate", judge is not None)),
        max_new_tokens=read_number("max_new_tokens", values.get("max_new_tokens", 64), whole=True, least=1),
        side_effects=side_effects or files["refusal_file"] is not None or files["neutral_file"] is not None,
        **files,
        reference=_reference(values.get("reference"), methods),
        judge=judge,
        judge_by=judged,
        title=str(values.get("title") or "Comparison of methods"),
        given=values,
    )


def folder_name(name: str) -> str:
    """A method's name as a folder."""
    return "".join(letter if letter.isalnum() or letter in "-_.+" else "-" for letter in name).strip(".") or "-"


def _check_distinct_folders(methods: list[Method]) -> None:
    seen: dict[str, str] = {}
    for method in methods:
        other = seen.setdefault(folder_name(method.name).lower(), method.name)
        if other != method.name:
            raise ReftuneError(f"methods {other!r} and {method.name!r} need names that differ more.")


def _generate(value: Any) -> int:
    if value is None or isinstance(value, bool):
        return -1 if value else 0
    if not isinstance(value, int) or value < 0:
        raise ReftuneError(f"generate={value!r}: write true (all held-out rows), false, or a number of rows.")
    return value


def _seeds(value: Any) -> tuple[int, ...]:
    seeds = value if isinstance(value, (list, tuple)) else [value]
    wrong = [seed for seed in seeds if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32]
    if wrong or not seeds or len(set(seeds)) != len(seeds):
        raise ReftuneError(f"seeds={value!r}: write different whole numbers, 0 to 2**32 - 1, such as [0, 1, 2].")
    return tuple(seeds)


def _reference(value: Any, methods: list[Method]) -> str:
    names = [method.name for method in methods]
    if value is not None:
        check_names([str(value)], dict.fromkeys(names, ()), "reference", "method")
        return str(value)
    lora = [method.name for method in methods if method.kind == "lora"]
    trained = [method.name for method in methods if method.trains]
    return (lora or trained or names)[0]
