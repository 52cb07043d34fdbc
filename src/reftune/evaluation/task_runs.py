"""Evaluating a task: answers (or option scores) for every row, judged, with an interval; base and edited alike."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from peft import get_peft_model_state_dict
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from reftune.data.templates import resolve_template
from reftune.data.tokenising import Encoding
from reftune.engine.hooks import Engine
from reftune.errors import ReftuneError
from reftune.evaluation.extraction import same
from reftune.evaluation.intervals import Interval, PairedDifference, bootstrap_interval, paired_test
from reftune.evaluation.options import NORMS, OptionRow, OptionScores, evaluate_options
from reftune.evaluation.result_files import ResultFile
from reftune.evaluation.task_rows import TaskRow
from reftune.evaluation.tasks import OPTIONS, TASKS, OptionForm, Task
from reftune.inference.generation import GenerationSettings, generate_answers
from reftune.inference.loading import EditedModel
from reftune.output import terminal
from reftune.output.files import write_text

Scoring = Literal["generate", "options"]
PAPER = "paper"
"""The template name that stands for the task's own prompt."""

_LEAST_ROOM = 16
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Metric:
    """A share of rows, its 95% bootstrap interval, and which rows they are."""

    value: float
    interval: Interval
    right: tuple[bool, ...]


@dataclass(frozen=True)
class TaskScore:
    """What one model scores on one task.

    Attributes:
        task: its name.
        model: `base` or `edited`.
        scoring: `generate` or `options`.
        metrics: by name: `accuracy` of generated answers; `acc`, `acc_norm` and `acc_token` of options; none where
            nothing is judged.
        records: one a row, as in the JSONL file.
        seconds: this call's work (rows done before an interruption are not in it).
    """

    task: str
    model: str
    scoring: str
    metrics: dict[str, Metric]
    records: list[dict[str, Any]]
    seconds: float

    @property
    def accuracy(self) -> float | None:
        """The first metric, or None."""
        return next((metric.value for metric in self.metrics.values()), None)

    def as_dict(self) -> dict[str, Any]:
        """Everything but the rows."""
        metrics = {
            name: {"value": metric.value, "low": metric.interval.low, "high": metric.interval.high}
            for name, metric in self.metrics.items()
        }
        return {"rows": len(self.records), "seconds": round(self.seconds, 3), "metrics": metrics}


def evaluate_task(
    edited: EditedModel,
    task: Task | str,
    rows: Sequence[TaskRow] | Sequence[OptionRow],
    settings: GenerationSettings | None = None,
    *,
    base: bool = False,
    scoring: Scoring = "generate",
    form: OptionForm = "label",
    template: str | None = None,
    out: Path | None = None,
    progress: bool = False,
) -> TaskScore:
    """Evaluate one task.

    Args:
        edited: the model.
        task: a task or its name; `"options"` with `OptionRow`s for options of any kind.
        rows: the task's (`task.rows(...)`), or option rows.
        settings: decoding, the task's own (the paper's) where None; its batch size serves both scorings.
        base: without the edit.
        scoring: generate an answer and read it, or compare the log-likelihoods of the options.
        form: of the options (see `Task.option_rows`).
        template: None puts instructions into the model's encoding as they were in training; `"paper"` into the task's
            prompt; anything else is a raw template with one `%s`.
        out: folder for the results, one line an example, written as they come: an evaluation that was interrupted goes
            on where it stopped, if everything else is the same.
        progress: show a bar on stderr.

    Returns:
        The score.

    Raises:
        ReftuneError: a prompt that does not fit, a task without options, results of other settings in `out`.
    """
    task = task if isinstance(task, Task) or task == OPTIONS else _task(task)
    if not rows:
        raise ReftuneError("there are no rows to evaluate")
    settings = settings or (task.decoding if isinstance(task, Task) else GenerationSettings())
    scoring = "options" if not isinstance(task, Task) else scoring
    encoding = _encoding(edited, task, template, scoring, form)
    name, model = (task.name if isinstance(task, Task) else OPTIONS), ("base" if base else "edited")
    found = ResultFile(out, f"{name}.{model}", _fingerprint(edited, rows, settings, encoding, base, scoring, form))
    began = time.perf_counter()
    with _bar(progress, f"{name}, {model}", len(rows), len(found.records)) as advance:
        if scoring == "options":
            prepared = _option_rows(task, rows, form, encoding)
            _score_options(edited, prepared, settings, encoding, base, found, advance)
        else:
            _generate(edited, task, rows, settings, encoding, base, found, advance)  # type: ignore[arg-type]
    records = found.finish()
    if out is not None and isinstance(task, Task) and task.extract is None:
        write_text(out / f"{name}.{model}.json", _alpaca_file(rows, records, edited, base))  # type: ignore[arg-type]
    return TaskScore(name, model, scoring, _metrics(records), records, time.perf_counter() - began)


def difference(edited: TaskScore, base: TaskScore, metric: str) -> PairedDifference:
    """Edited less base on the same rows, with the p value of no difference."""
    return paired_test(edited.metrics[metric].right, base.metrics[metric].right)


def _task(name: str) -> Task:
    if name not in TASKS:
        raise ReftuneError(f"task {name!r} is not known; there are: {', '.join(TASKS)}, {OPTIONS}")
    return TASKS[name]


def _encoding(edited: EditedModel, task: Task | str, template: str | None, scoring: str, form: str) -> Encoding:
    if template is None or (template == PAPER and not isinstance(task, Task)):
        return edited.encoding
    if template == PAPER and isinstance(task, Task):
        as_text = scoring == "options" and form == "text"
        return replace(edited.encoding, template=task.text_template if as_text else task.template, system_prompt=None)
    resolve_template(edited.tokenizer, template)
    return replace(edited.encoding, template=template)


# Generation


def _generate(
    edited: EditedModel,
    task: Task,
    rows: Sequence[TaskRow],
    settings: GenerationSettings,
    encoding: Encoding,
    base: bool,
    found: ResultFile,
    advance: Any,
) -> None:
    speaker = replace(edited, encoding=encoding)
    lengths = [len(ids) for ids in encoding.prompt_ids([row.instruction for row in rows])]
    for row, length in zip(rows, lengths, strict=True):
        if encoding.limit is not None and length + min(_LEAST_ROOM, settings.max_new_tokens) > encoding.limit:
            raise ReftuneError(
                f"{row.where}: the prompt has {length} tokens and leaves no room for an answer in the model's "
                f"{encoding.limit}: leave the row out, or use a model with a longer context"
            )
    # Rows of like length in one batch: less padding, and the longest answers together.
    order = sorted((index for index in range(len(rows)) if index not in found.records), key=lambda i: (lengths[i], i))
    for start in range(0, len(order), settings.batch_size):
        chosen = order[start : start + settings.batch_size]
        room = settings.max_new_tokens
        if encoding.limit is not None:
            room = min(room, encoding.limit - max(lengths[index] for index in chosen))
        # A batch's own seed, so that what is sampled does not depend on where an earlier run stopped.
        here = replace(settings, max_new_tokens=room, seed=settings.seed + chosen[0])
        prompts = [rows[index].instruction for index in chosen]
        answers = list(generate_answers(speaker, prompts, here, base=base))
        found.add(
            (index, _judged(task, rows[index], encoding, answer.text))
            for index, answer in zip(chosen, answers, strict=True)
        )
        advance(len(chosen))


def _judged(task: Task, row: TaskRow, encoding: Encoding, answer: str) -> dict[str, Any]:
    prompt = encoding.render(row.instruction)
    record: dict[str, Any] = {"prompt": prompt, "answer": answer}
    if task.extract is not None and row.answer is not None:
        extracted = task.extract(answer)
        record |= {"gold": row.answer, "extracted": extracted, "right": same(extracted, row.answer)}
    return record


# Options


def _option_rows(task: Task | str, rows: Sequence[Any], form: OptionForm, encoding: Encoding) -> list[OptionRow]:
    if not isinstance(task, Task):
        return list(rows)
    found = task.option_rows(rows, form)
    raw = resolve_template(encoding.tokenizer, encoding.template)
    if form == "label" or raw is None or raw[-1:].isspace():
        return found
    # "Answer:" is followed by a space in running text; options of a user's own file are taken as they are.
    return [replace(row, options=tuple(f" {option}" for option in row.options)) for row in found]


def _score_options(
    edited: EditedModel,
    rows: Sequence[OptionRow],
    settings: GenerationSettings,
    encoding: Encoding,
    base: bool,
    found: ResultFile,
    advance: Any,
) -> None:
    order = sorted((i for i in range(len(rows)) if i not in found.records), key=lambda i: (len(str(rows[i].prompt)), i))
    chunk = settings.batch_size * 8
    with edited.model.disable_adapter() if base else nullcontext():
        for start in range(0, len(order), chunk):
            chosen = order[start : start + chunk]
            scores = evaluate_options(
                edited.model, edited.tokenizer, [rows[index] for index in chosen], encoding=encoding,
                batch_size=settings.batch_size, check=start == 0, advance=advance,
            )  # fmt: skip
            found.add((i, _chosen(rows[i], encoding, score)) for i, score in zip(chosen, scores, strict=True))


def _chosen(row: OptionRow, encoding: Encoding, score: OptionScores) -> dict[str, Any]:
    assert row.answer is not None
    return {
        "prompt": encoding.render(row.prompt),
        "options": list(row.options),
        "log_likelihoods": list(score.log_likelihoods),
        "answer": row.options[score.chosen()],
        "gold": row.options[row.answer],
        "right": {norm: score.right(norm) for norm in NORMS},
    }


# What comes out


def _metrics(records: Sequence[dict[str, Any]]) -> dict[str, Metric]:
    judged: dict[str, list[bool]] = {}
    for record in records:
        right = record.get("right")
        for name, value in right.items() if isinstance(right, dict) else [("accuracy", right)]:
            if value is not None:
                judged.setdefault(name, []).append(bool(value))
    return {
        name: Metric(sum(right) / len(right), bootstrap_interval(right), tuple(right)) for name, right in judged.items()
    }


def _alpaca_file(rows: Sequence[TaskRow], records: Sequence[dict[str, Any]], edited: EditedModel, base: bool) -> str:
    """AlpacaEval's model outputs: a list of {instruction, output, generator, dataset}."""
    name = _base_name(edited) if base else str(edited.folder.resolve().name if edited.folder else "edited")
    outputs = [
        {"instruction": row.instruction, "output": record["answer"], "generator": name, "dataset": row.dataset}
        for row, record in zip(rows, records, strict=True)
    ]
    return json.dumps(outputs, indent=2, ensure_ascii=False) + "\n"


def _fingerprint(
    edited: EditedModel,
    rows: Any,
    settings: GenerationSettings,
    encoding: Encoding,
    base: bool,
    scoring: str,
    form: str,
) -> dict[str, Any]:
    """What decides the results; the batch size does not."""
    decoding = {name: value for name, value in asdict(settings).items() if name != "batch_size"}
    read = [(row.instruction, row.answer) if isinstance(row, TaskRow) else asdict(row) for row in rows]
    return {
        "model": _base_name(edited),
        "dtype": str(edited.model.dtype),
        "adapter": None if base else _adapter_hash(edited),
        "rows": len(rows),
        "data": hashlib.sha256(json.dumps(read, default=str).encode()).hexdigest(),
        "template": encoding.template,
        "system_prompt": encoding.system_prompt,
        **({"chat_template_kwargs": dict(arguments)} if (arguments := encoding.chat_template_kwargs) else {}),
        "scoring": scoring,
        **({"options": form} if scoring == "options" else {"decoding": decoding}),
    }


def _base_name(edited: EditedModel) -> str:
    base: Any = edited.model.get_base_model()
    return str(getattr(base, "name_or_path", "") or type(base).__name__)


def _adapter_hash(edited: EditedModel) -> str:
    """Of what every adapter that edits holds, in their order, and of strengths other than 1."""
    digest, engine = hashlib.sha256(), Engine.of(edited.model.get_base_model())
    for adapter in edited.strengths or ["default"]:
        for name, tensor in sorted(get_peft_model_state_dict(edited.model, adapter_name=adapter).items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        if engine is not None and (strength := engine.placements(adapter)[0].scale) != 1.0:
            digest.update(f"*{strength!r}".encode())
    return digest.hexdigest()


@contextmanager
def _bar(shown: bool, title: str, total: int, done: int) -> Iterator[Any]:
    """A progress bar that begins at what is done already; yields the function that advances it."""
    if done:
        logger.info("%s: %s of %s rows were done before", title, done, total)
    if not shown:
        yield lambda count: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=terminal.console(stderr=True), transient=True) as bar:
        row = bar.add_task(title, total=total, completed=done)
        yield lambda count: bar.advance(row, count)
