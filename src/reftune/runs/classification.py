"""Carry out a recipe with `task: classification`: edits and a new head, trained and tested as in the paper's GLUE runs.

The best checkpoint by the task's metric on the validation rows is kept; the test rows are looked at once, at the end.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import transformers
from rich.console import Console
from torch import nn

from reftune.data.classification import NUMBER, LabelScheme, label_scheme, read_texts
from reftune.data.formats import LabelledText
from reftune.data.glue import GLUE, GlueTask, split_held_out
from reftune.data.splitting import split_rows
from reftune.errors import ReftuneError
from reftune.evaluation.classification import (
    ClassificationScore,
    compute_metrics,
    evaluate_classification,
    measures_for,
)
from reftune.inference.classifying import EditedClassifier, describe_labels
from reftune.inference.prompts import to_jsonl
from reftune.output.files import write_text
from reftune.runs.fingerprint import base_digest
from reftune.runs.output_folder import check_output, readable_disk_errors
from reftune.runs.processes import from_first, rank
from reftune.runs.recipe import TrainRecipe
from reftune.runs.steps import Prepared, TrainedRun, attach_edit, load_base, train_and_write
from reftune.training.trainer import ReftTrainer

_NO_PREFIXES = (
    "a classifier has no completion to reuse a prompt for, and an encoder attends in both directions, so that an edit "
    "changes every token above it"
)
_PEFTS_OWN = ("classifier", "score")  # PEFT saves these of every classifier by itself


@dataclass(frozen=True)
class ClassificationData:
    """Rows with labels as names (or floats): training, validation (may be none), and tests by name (may be none)."""

    scheme: LabelScheme
    train: list[LabelledText]
    validation: list[LabelledText]
    tests: dict[str, list[LabelledText]]


def run_classification(recipe: TrainRecipe, console: Console) -> TrainedRun:
    """Train a classifier as the recipe says and write the output folder; errors as for `runs.run_training`."""
    place = from_first("place", lambda: check_output(recipe))
    data = read_classification_data(recipe)
    scheme = data.scheme
    measures = measures_for(scheme, recipe.glue, recipe.metric)
    if recipe.glue is None:  # run.yaml says what the head's outputs mean
        recipe = replace(recipe, labels=NUMBER if scheme.regression else list(scheme.names))
    transformers.set_seed(recipe.seed)
    new_weights: list[str] = []
    base, tokenizer = load_base(recipe, task="seq_cls", num_labels=scheme.outputs, new_weights=new_weights)
    describe_labels(base, scheme)
    digest = base_digest(base)
    head = head_modules(base, new_weights)
    recipe = recipe.fitted(base)
    model = attach_edit(base, recipe, [name for name in head if name not in _PEFTS_OWN])
    best = {"metric_for_best_model": f"eval_{measures.main}", "greater_is_better": True} if data.validation else {}
    ready = Prepared(
        recipe,
        model,
        tokenizer,
        digest,
        data.train,
        data.validation,
        report=lambda trainer: _report(trainer, tokenizer, data, recipe, place.folder),
        label_names=scheme.names,
        arguments=best,
        compute_metrics=compute_metrics(measures, scheme),
        no_prefixes=_NO_PREFIXES,
    )
    return train_and_write(ready, place, console)


def read_classification_data(recipe: TrainRecipe) -> ClassificationData:
    """The rows of a recipe, each label checked.

    GLUE on the Hub brings its own held-out rows. With `split_eval` part of the held-out rows is the test (see
    `data.glue.split_held_out`).

    Raises:
        ReftuneError: naming file, row and column.
    """
    task = GLUE[recipe.glue] if recipe.glue else None
    train = _read(recipe, recipe.train_file, recipe.split, task)
    held_out: list[LabelledText] | None = None
    if recipe.eval_file:
        held_out = _read(recipe, recipe.eval_file, task.validation if task else "validation", task)
    elif task and not recipe.eval_fraction and not _is_file(recipe.train_file):
        held_out = _read(recipe, recipe.train_file, task.validation, task)
    scheme = LabelScheme(task.labels) if task else label_scheme(train, recipe.labels)
    train, held_out = split_rows(train, eval_fraction=recipe.eval_fraction, eval_rows=held_out, seed=recipe.seed)
    label_scheme(train, NUMBER if scheme.regression else scheme.names)  # what is left must be of two classes at least
    tests: dict[str, list[LabelledText]] = {}
    if recipe.split_eval:
        if len(held_out) < 2:
            raise ReftuneError(
                f"split_eval: there are {len(held_out)} held-out rows to split; give eval_file or eval_fraction."
            )
        held_out, tests["test"] = split_held_out(held_out, recipe.seed)
    second = task.mismatched if task else None
    name = "test_mismatched" if second else "test_file" if tests else "test"
    if recipe.test_file:
        tests[name] = _read(recipe, recipe.test_file, second or "test", task)
    elif second and not _is_file(recipe.train_file):
        tests[name] = _read(recipe, recipe.train_file, second, task)
    return ClassificationData(
        scheme,
        [scheme.read(row) for row in train],
        [scheme.read(row) for row in held_out],
        {name: [scheme.read(row) for row in rows] for name, rows in tests.items()},
    )


def head_modules(model: nn.Module, new_weights: list[str]) -> list[str]:
    """Modules that must be trained and saved with the edits: the head, and whatever else started at random.

    Args:
        model: a sequence classifier.
        new_weights: parameters that its checkpoint does not hold, such as the pooler of some encoders.
    """
    backbone = getattr(model, "base_model_prefix", "")
    outside = [
        name
        for name, child in model.named_children()
        if name != backbone and next(child.parameters(), None) is not None
    ]
    random = {name.rpartition(".")[0] for name in new_weights}
    inside = [name for name in sorted(random) if name and not any(f"{name}.".startswith(f"{o}.") for o in outside)]
    return [*outside, *inside]


def _read(recipe: TrainRecipe, source: str, split: str, task: GlueTask | None) -> list[LabelledText]:
    columns = recipe.columns if isinstance(recipe.columns, dict) else None
    names = task.columns if task else ()
    return read_texts(source, columns=columns, names=names, split=split, limit=recipe.limit_rows)


def _is_file(source: str) -> bool:
    return Path(source).expanduser().is_file()


def _report(
    trainer: ReftTrainer, tokenizer: Any, data: ClassificationData, recipe: TrainRecipe, output: Path
) -> dict[str, Any]:
    """What `metrics.json` holds of a classifier; **writes** the test rows' predictions beside it."""
    model, scheme = trainer.model, data.scheme
    classifier = EditedClassifier(model, tokenizer, scheme, recipe.max_length, recipe.glue, recipe.metric, output)
    parts = {"validation": data.validation, **data.tests}
    size = trainer.args.per_device_eval_batch_size
    scores = {name: evaluate_classification(classifier, rows, size) for name, rows in parts.items() if rows}
    for name in data.tests if rank() == 0 else ():
        _write_predictions(output / f"{name}_predictions.jsonl", data.tests[name], scores[name])
    history = trainer.state.log_history
    epochs = [
        {"epoch": entry["epoch"], **{key.removeprefix("eval_"): entry[key] for key in entry if _is_metric(key)}}
        for entry in history
        if "eval_loss" in entry
    ]
    edits = sum(p.numel() for n, p in classifier.model.named_parameters() if p.requires_grad and ".reft_" in n)
    return {
        "task": recipe.task,
        "glue": recipe.glue,
        "labels": list(scheme.names) or NUMBER,
        "edit_parameters": edits,
        "epochs": epochs,
        **{name: score.as_dict() for name, score in scores.items()},
    }


def _is_metric(key: str) -> bool:
    return key.startswith("eval_") and not key.endswith(("_runtime", "_per_second", "_time"))


def _write_predictions(path: Path, rows: list[LabelledText], score: ClassificationScore) -> None:
    records = (
        {"text": row.text, "text_pair": row.text_pair, "label": row.label, "predicted": predicted}
        for row, predicted in zip(rows, score.predictions, strict=True)
    )
    with readable_disk_errors(path.parent):
        write_text(path, to_jsonl(records))
