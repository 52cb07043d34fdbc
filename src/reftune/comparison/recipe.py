"""`CompareRecipe`: which methods are compared, on what, with which seeds; read from YAML and checked as a whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from reftune.comparison.methods import Method, read_method
from reftune.errors import ReftuneError
from reftune.runs.recipe import TrainRecipe, adapter_keys, recipe_fields
from reftune.runs.recipe_values import check_names, read_yaml

RECIPE_FILE = "comparison.yaml"
JUDGED_BY = ("final", "best")

_OWN: Mapping[str, tuple[str, ...]] = {
    "methods": ("runs", "adapters"),
    "seeds": ("seed_list",),
    "generate": ("generation", "prompts"),
    "max_new_tokens": ("max_tokens",),
    "options": ("option_file", "options_file"),
    "reference": ("baseline",),
    "judge_by": (),
    "title": ("name",),
}
_ONE_RUN = ("resume", "overwrite", "show", "tensorboard", "wandb", "log_every")
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
        reference: the method that the others are tested against.
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
    reference: str
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
        if name not in names:
            check_names([name], dict.fromkeys(names, ()), "methods", "name")
        return names[name]

    def runs(self) -> list[tuple[Method, int]]:
        """Every (method, seed), seed by seed, so that a broken-off comparison has every method at the first seeds.

        The base model is not trained, so it is evaluated once.
        """
        return [
            (method, seed)
            for index, seed in enumerate(self.seeds)
            for method in self.methods
            if method.trains or index == 0
        ]

    def to_yaml(self) -> str:
        """The recipe with local files by their full path, ready to run again anywhere."""
        values = dict(self.given)
        for name in ("train_file", "eval_file", "model"):
            if getattr(self.shared, name):
                values[name] = self.shared.full_path(name)
        values["output"] = str(self.folder.resolve())
        if self.options:
            values["options"] = str(Path(self.options).expanduser().resolve())
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120)


def resolve_comparison(source: str | Path | Mapping[str, Any], flags: Mapping[str, Any] | None = None) -> CompareRecipe:
    """Make a comparison from a YAML file or a mapping, and flags, which win.

    Args:
        source: a recipe, the folder of an earlier comparison, or the recipe's content.
        flags: values by key; None means "not given".

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
    given = {name: value for name, value in (flags or {}).items() if value is not None}
    if "eval_file" in given:
        values.pop("eval_fraction", None)
    if "eval_fraction" in given:
        values.pop("eval_file", None)
    return _checked(values | given, where)


def _checked(values: dict[str, Any], where: str) -> CompareRecipe:
    adapter = adapter_keys()
    top = {item.name: item.metadata["aka"] for item in recipe_fields() if item.name not in (*adapter, *_ONE_RUN)}
    for key in values:
        if key in adapter:
            raise ReftuneError(f"{where}: {key!r} belongs to a method; write it under its name in `methods`.")
        if key in _ONE_RUN:
            raise ReftuneError(f"{where}: {key!r} is a key of one training run, not of a comparison; leave it out.")
    check_names(values, {**_OWN, **top}, where)
    shared = {name: value for name, value in values.items() if name in top}
    shared.setdefault("output", "comparison")
    entries = values.get("methods")
    if not isinstance(entries, Mapping) or not entries:
        raise ReftuneError(f"{where}: methods={entries!r}: write at least one `name: {{method: loreft, ...}}`.")
    try:
        recipe = TrainRecipe(**{**shared, "tensorboard": False})
    except ReftuneError as error:
        raise ReftuneError(f"{where}: {error}") from None
    if recipe.task != "completion":
        raise ReftuneError(f"{where}: task={recipe.task!r}: completions are compared; classifiers are not.")
    if not recipe.eval_file and not recipe.eval_fraction:
        raise ReftuneError(f"{where}: methods are judged on held-out rows: give eval_file, or eval_fraction: 0.1.")
    shared["tensorboard"] = False
    methods: list[Method] = []
    for name, entry in entries.items():
        if entry is not None and not isinstance(entry, (str, Mapping)):
            raise ReftuneError(f"{where}: methods: {name}: {entry!r}: write `{{method: loreft, ...}}`.")
        methods.append(read_method(str(name), entry, shared, where))
    _distinct_folders(methods, where)
    generate = _generate(values.get("generate"), where)
    tokens = values.get("max_new_tokens", 64)
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
        raise ReftuneError(f"{where}: max_new_tokens={tokens!r}: give a whole number of tokens, at least 1.")
    judged = values.get("judge_by", "final")
    if judged not in JUDGED_BY:
        raise ReftuneError(f"{where}: judge_by={judged!r}: choose {' or '.join(JUDGED_BY)}.")
    options = values.get("options")
    if options is not None and not Path(str(options)).expanduser().is_file():
        raise ReftuneError(f"{where}: options={options!r}: there is no such file.")
    return CompareRecipe(
        shared=recipe,
        methods=tuple(methods),
        seeds=_seeds(values.get("seeds", [0]), where),
        generate=generate,
        max_new_tokens=tokens,
        options=None if options is None else str(options),
        reference=_reference(values.get("reference"), methods, where),
        judge_by=judged,
        title=str(values.get("title") or "Comparison of methods"),
        given=values,
    )


def folder_name(name: str) -> str:
    """A method's name as a folder."""
    return "".join(letter if letter.isalnum() or letter in "-_.+" else "-" for letter in name).strip(".") or "-"


def _distinct_folders(methods: list[Method], where: str) -> None:
    seen: dict[str, str] = {}
    for method in methods:
        folder = folder_name(method.name).lower()
        if folder in seen:
            raise ReftuneError(f"{where}: methods {seen[folder]!r} and {method.name!r} need names that differ more.")
        seen[folder] = method.name


def _generate(value: Any, where: str) -> int:
    if value is None or value is False:
        return 0
    if value is True:
        return -1
    if not isinstance(value, int) or value < 0:
        raise ReftuneError(f"{where}: generate={value!r}: write true (all held-out rows), false, or a number of rows.")
    return value


def _seeds(value: Any, where: str) -> tuple[int, ...]:
    seeds = value if isinstance(value, (list, tuple)) else [value]
    wrong = [seed for seed in seeds if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0]
    if wrong or not seeds or len(set(seeds)) != len(seeds):
        raise ReftuneError(f"{where}: seeds={value!r}: write different whole numbers of at least 0, such as [0, 1, 2].")
    return tuple(seeds)


def _reference(value: Any, methods: list[Method], where: str) -> str:
    names = [method.name for method in methods]
    if value is not None:
        if str(value) not in names:
            check_names([str(value)], dict.fromkeys(names, ()), f"{where}: reference", "method")
        return str(value)
    lora = [method.name for method in methods if method.kind == "lora"]
    trained = [method.name for method in methods if method.trains]
    return (lora or trained or names)[0]
