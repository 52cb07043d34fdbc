"""`reftune eval`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.table import Table

from reftune.cli.common_options import BASE_MODEL
from reftune.cli.flags import with_flags
from reftune.errors import ReftuneError
from reftune.inference.settings import BaseModel, GenerationSettings
from reftune.output import terminal
from reftune.output.targets import check_file_target, check_folder_target, result_with
from reftune.runs.recipe_values import option, read_columns, read_flags, typed_fields

_HELD_OUT, _TASKS, _BOTH = "Held-out rows", "Tasks", "Options"


@dataclass(frozen=True)
class EvalOptions:
    """What is evaluated, on which rows, and where the results go."""

    test_file: str | None = option(
        None, _HELD_OUT, "Loss and exact match on rows that training did not see; the formats of --train-file.", "file"
    )
    columns: str | None = option(None, _HELD_OUT, "Names of your columns: prompt=question,completion=answer.")
    split: str = option("train", _HELD_OUT, "Split of a Hub dataset.")
    generate: bool = option(True, _HELD_OUT, "Answer greedily and count exact matches.")
    task: str | None = option(
        None, _TASKS,
        "Accuracy on the paper's tasks: boolq, piqa, siqa, hellaswag, winogrande, arc_easy, arc_challenge, openbookqa "
        "(together: commonsense); aqua, gsm8k, mawps, svamp, addsub, multiarith, singleeq (together: arithmetic); "
        "instruct writes answers for AlpacaEval; options takes any file of {prompt, options, answer}. Several: a,b.",
        "names",
    )  # fmt: skip
    data: str | None = option(
        None, _TASKS,
        "The task's file (LLM-Adapters' format or the Hub dataset's columns), or a folder with one for each task; "
        "default: the Hub dataset.",
        "path",
    )  # fmt: skip
    scoring: Literal["generate", "options"] = option(
        "generate", _TASKS, "Read a generated answer, or take the likeliest option."
    )
    options: Literal["label", "text"] = option(
        "label", _TASKS,
        "With --scoring options: the options' names as in training ('the correct answer is answer2') or their texts, "
        "the question asked without them.",
    )  # fmt: skip
    template: str | None = option(
        None, _TASKS,
        "Prompt around an instruction: as in training ('trained'), the paper's ('paper'), or a text with one %s; "
        "default: trained where DIR says how that was, else paper.",
        "text",
    )  # fmt: skip
    chat_template_kwargs: str | None = option(
        None, _BOTH, "Arguments of the chat template, as in enable_thinking=false; default: those of training."
    )
    greedy: bool = option(False, _TASKS, "Take the likeliest token also where the paper samples.")
    seed: int = option(0, _TASKS, "Seed of the sampling.")
    limit_rows: int | None = option(None, _BOTH, "Only the first so many rows (of each task).", "rows", least=1)
    batch_size: int = option(8, _BOTH, "Rows of one forward pass.", "rows", least=1)
    max_new_tokens: int | None = option(
        None, _BOTH, "Longest answer; default: 128 for the exact match, the paper's for a task.", "tokens", least=1
    )
    base: bool = option(True, _BOTH, "Score the base model beside it.")
    base_only: bool = option(False, _BOTH, "DIR is a base model (name or folder): score it alone, on tasks.")
    out: str | None = option(
        None, _BOTH,
        "Write scores and answers: a JSON file with --test-file; with --task a folder of JSONL files, from which an "
        "interrupted evaluation goes on.",
        "path",
    )  # fmt: skip


def evaluate(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="DIR", help="Adapter folder: the --output of `reftune train`; with --base-only a base model."
        ),
    ],
    **flags: Any,
) -> None:
    """Held-out loss and exact match, or accuracy on tasks, of an adapter beside its base model."""
    options, base_model = read_flags(EvalOptions, flags), read_flags(BaseModel, flags)
    if (options.test_file is None) == (options.task is None):
        raise ReftuneError("give one of --test-file (loss and exact match) and --task (accuracy)")
    if options.task is not None:
        return _evaluate_tasks(folder, options.task, options, base_model)
    assert options.test_file is not None
    if options.base_only:
        raise ReftuneError(
            "--base-only scores tasks: give --task; with --test-file the base stands beside the edited model"
        )
    if options.out is not None:
        check_file_target(Path(options.out), "--out", [options.test_file], ours=result_with("test_file"))
    from reftune.inference.classifying import is_classifier

    score = _score_classifier if is_classifier(folder) else _score_rows
    table, record = score(folder, options.test_file, options, base_model)
    console = terminal.console()
    console.print(table)
    if options.out is not None:
        from reftune.cli.results import write_out

        record = {"adapter": str(folder), "test_file": options.test_file, **record}
        write_out(Path(options.out), json.dumps(record, indent=2, ensure_ascii=False) + "\n", console)


def _score_rows(
    folder: Path, test_file: str, options: EvalOptions, base_model: BaseModel
) -> tuple[Table, dict[str, Any]]:
    """Loss and exact match: a table, and what the results file holds."""
    from reftune.data.formats import read_examples
    from reftune.evaluation.heldout import evaluate_rows
    from reftune.inference.loading import load_edited, recorded_run

    settings = GenerationSettings(max_new_tokens=options.max_new_tokens or 128, batch_size=options.batch_size)
    rows = read_examples(
        test_file,
        columns=read_columns(options.columns),
        usual=read_columns(recorded_run(folder).get("columns")),
        split=options.split,
        limit=options.limit_rows,
    )
    edited = load_edited(folder, chat_template_kwargs=options.chat_template_kwargs, **asdict(base_model))
    names = ["base", "edited"] if options.base else ["edited"]
    scores = {
        name: evaluate_rows(edited, rows, settings, base=name == "base", generate=options.generate) for name in names
    }
    table = Table(
        title=f"{test_file}: {len(rows)} rows, {scores['edited'].tokens} supervised tokens", title_justify="left"
    )
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right")
    table.add_row("loss (nats a supervised token)", *(f"{scores[name].loss:.4f}" for name in names))
    table.add_row("perplexity", *(f"{scores[name].perplexity:.3f}" for name in names))
    record: dict[str, Any] = {"rows": len(rows), **{name: score.as_dict() for name, score in scores.items()}}
    if options.generate:
        table.add_row("exact match", *(f"{scores[name].exact_match:.1%}" for name in names))
        answers = {name: score.answers or [] for name, score in scores.items()}
        record["answers"] = [
            {"completion": row.completion, **{name: answers[name][index] for name in names}}
            for index, row in enumerate(rows)
        ]
    return table, record


def _score_classifier(
    folder: Path, test_file: str, options: EvalOptions, base_model: BaseModel
) -> tuple[Table, dict[str, Any]]:
    """A classifier's metrics, each with its interval: a table, and what the results file holds."""
    from reftune.data.classification import read_texts
    from reftune.evaluation.classification import evaluate_classification
    from reftune.inference.classifying import load_classifier, training_columns

    known, names = training_columns(folder)
    columns = read_columns(options.columns) or known
    rows = read_texts(test_file, columns=columns, names=names, split=options.split, limit=options.limit_rows)
    classifier = load_classifier(folder, **asdict(base_model))
    score = evaluate_classification(classifier, rows, options.batch_size)
    table = Table("", title=f"{test_file}: {score.rows} rows", title_justify="left")
    for name in ("score", "95% interval"):
        table.add_column(name, justify="right")
    for name, value in score.metrics.items():
        found = score.intervals[name]
        table.add_row(name.replace("_", " "), f"{value:.4f}", f"{found.low:.4f} to {found.high:.4f}")
    table.add_row("squared error" if classifier.scheme.regression else "loss (nats a row)", f"{score.loss:.4f}", "")
    return table, {**score.as_dict(), "predictions": score.predictions}


def _evaluate_tasks(folder: Path, task: str, options: EvalOptions, base_model: BaseModel) -> None:
    from reftune.cli.results import task_table
    from reftune.evaluation.task_report import SUMMARY, base_alone, default_template, evaluate_tasks
    from reftune.evaluation.tasks import expand_names
    from reftune.inference.loading import load_edited

    expand_names(task)  # a misspelt name costs no loading
    out = None if options.out is None else Path(options.out)
    if out is not None and out.is_file():
        raise ReftuneError(f"--out {out} is a file; with --task it is a folder")
    if out is not None:
        check_folder_target(out, "--out ", ["*.settings.json"], [folder, options.data])
    if options.base_only:
        edited = base_alone(str(folder), base_model.dtype, base_model.device, options.chat_template_kwargs)
    else:
        edited = load_edited(folder, chat_template_kwargs=options.chat_template_kwargs, **asdict(base_model))
    template = options.template
    report = evaluate_tasks(
        edited,
        task,
        options.data,
        models=["base"] if options.base_only else ["base", "edited"] if options.base else ["edited"],
        scoring=options.scoring,
        form=options.options,
        template=default_template(edited.folder) if template is None else None if template == "trained" else template,
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens,
        greedy=options.greedy,
        seed=options.seed,
        limit=options.limit_rows,
        out=out,
        progress=True,
    )
    console = terminal.console()
    console.print(task_table(report))
    if out is not None:
        console.print(f"Written to {out / SUMMARY}", markup=False, highlight=False, soft_wrap=True)


with_flags(evaluate, typed_fields(EvalOptions) + BASE_MODEL)
