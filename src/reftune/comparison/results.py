"""The result of one run, its file, and the fingerprint that says whether it still answers the recipe."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from reftune.comparison.methods import Method
from reftune.comparison.recipe import CompareRecipe, folder_name
from reftune.data.formats import Example
from reftune.errors import ReftuneError
from reftune.evaluation.row_losses import RowLosses
from reftune.output.files import write_text
from reftune.output.json_files import read_json_object
from reftune.runs.recipe import COURSE, PER_CALL, adapter_keys, recipe_fields

RESULT_FILE = "result.json"
RESULT_FORMAT = 1

_NOT_SHARED = (*PER_CALL, "output", "tensorboard", "wandb", "log_every", "eval_fraction", *COURSE)
_FILES = ("train_file", "eval_file", "split", "columns", "limit_rows")


@dataclass(frozen=True)
class RunResult:
    """What one method came to with one seed; a `result.json`.

    Attributes:
        method: its name in the recipe.
        seed: of initialisation, row order and dropout.
        fingerprint: of everything that decides the result.
        settings: the method's own, resolved.
        loss: held-out loss a supervised token after the last epoch, in nats.
        best_loss: the lowest of the epochs.
        best_epoch: where it was, counted from 1 (0: before training).
        curve: (epoch, held-out loss) pairs, from before training on.
        train_curve: (epoch, training loss) pairs as logged.
        row_losses: sums of the held-out rows after the last epoch, in nats, in the rows' order.
        best_row_losses: the same at the best epoch.
        row_tokens: supervised tokens of those rows.
        exact_match: share of the answered rows that equal their completion; None if none was answered.
        answers: greedy answers to the first rows.
        option_accuracy: share of the option rows answered right (`acc`); None without options.
        options_right: right or wrong by norm (`acc`: the highest sum of log-likelihoods; `acc_norm`: a byte), row by
            row; empty without options.
        side_effects: figures of `evaluation.side_effects`; empty where they were not measured.
        trainable_parameters: their number.
        train_seconds: of training, evaluation excluded.
        epoch_seconds: the same by epoch.
        tokens_per_second: attended tokens by seconds of training.
        steps: optimiser steps.
        peak_memory_bytes: of training, beyond the libraries; None where it cannot be told.
        adapter_bytes: of the saved adapter (of the trained parameters, for full fine-tuning, which is not saved).
        order: digest of the batches in the order in which they were trained on.
        prefix_reuse: `on`, or `off` with the reason.
        shared_prefixes: whether it took prefixes from a store that other runs fill too, which spares it seconds.
        threads: of the CPU.
        versions: of the libraries, and the device.
    """

    method: str
    seed: int
    fingerprint: str
    settings: dict[str, Any]
    loss: float
    best_loss: float
    best_epoch: float
    curve: list[tuple[float, float]]
    train_curve: list[tuple[float, float]]
    row_losses: list[float]
    best_row_losses: list[float]
    row_tokens: list[int]
    exact_match: float | None
    answers: list[str]
    option_accuracy: float | None
    options_right: dict[str, list[bool]]
    side_effects: dict[str, float]
    trainable_parameters: int
    train_seconds: float
    epoch_seconds: list[float]
    tokens_per_second: float
    steps: int
    peak_memory_bytes: int | None
    adapter_bytes: int
    order: str
    prefix_reuse: str
    shared_prefixes: bool
    threads: int
    versions: dict[str, str]

    def rows(self, judged_by: str) -> RowLosses:
        """Losses of the held-out rows, `final` or `best`."""
        sums = self.best_row_losses if judged_by == "best" else self.row_losses
        return RowLosses(tuple(sums), tuple(self.row_tokens))

    def judged_loss(self, judged_by: str) -> float:
        """The held-out loss that the report judges by."""
        return self.best_loss if judged_by == "best" else self.loss

    def write(self, folder: Path) -> None:
        """Write `result.json`, whole or not at all: it says that the run is done."""
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / RESULT_FILE, json.dumps({"format": RESULT_FORMAT, **asdict(self)}, indent=1) + "\n")


def read_result(folder: Path) -> RunResult | None:
    """The result in a run's folder; None where there is none that this version can read."""
    try:
        values = read_json_object(folder / RESULT_FILE)
    except ReftuneError:
        return None
    if values.pop("format", None) != RESULT_FORMAT:
        return None
    values.setdefault("side_effects", {})  # written before there were any
    if set(values) != {item.name for item in fields(RunResult)}:
        return None
    try:
        for name in ("curve", "train_curve"):
            values[name] = [(float(x), float(y)) for x, y in values[name]]
    except (TypeError, ValueError, OverflowError):
        return None
    return RunResult(**values)


def run_folder(recipe: CompareRecipe, method: Method, seed: int) -> Path:
    """Where a run is written."""
    return recipe.folder / "runs" / folder_name(method.name) / f"seed{seed}"


def data_digest(train: Sequence[Example], held_out: Sequence[Example]) -> str:
    """A digest of the rows themselves, so that a file's place and format do not count."""
    digest = hashlib.sha256()
    for rows in (train, held_out):
        for row in rows:
            digest.update(json.dumps([[asdict(m) for m in row.messages], row.completion]).encode())
        digest.update(b"\0")
    return digest.hexdigest()


def fingerprint(recipe: CompareRecipe, method: Method, seed: int, data: str) -> str:
    """A digest of everything that decides a run's result.

    Args:
        recipe: the comparison.
        method: one of its methods.
        seed: one of its seeds.
        data: see `data_digest`.
    """
    of_methods = set(method.settings()) | {"lr", "seed"}
    left_out = {*_NOT_SHARED, *_FILES, *of_methods, *adapter_keys()}
    shared: Mapping[str, Any] = {
        item.name: getattr(method.train, item.name) for item in recipe_fields() if item.name not in left_out
    }
    decides = {
        "format": RESULT_FORMAT,
        "shared": {**shared, "model": recipe.shared.full_path("model")},
        "method": method.settings(),
        "seed": seed,
        "data": data,
        "generate": [recipe.generate, recipe.max_new_tokens] if recipe.generate else 0,
        "options": _file_digest("options", recipe.options),
    }
    if recipe.side_effects:
        files = [_file_digest(name, getattr(recipe, name)) for name in ("refusal_file", "neutral_file")]
        decides["side effects"] = [*files, recipe.max_new_tokens]
    return hashlib.sha256(json.dumps(decides, sort_keys=True, default=str).encode()).hexdigest()


def _file_digest(key: str, name: str | None) -> str | None:
    if name is None:
        return None
    try:
        return hashlib.sha256(Path(name).expanduser().read_bytes()).hexdigest()
    except OSError as error:
        raise ReftuneError(f"{key}={name!r}: {error.strerror}.") from None
