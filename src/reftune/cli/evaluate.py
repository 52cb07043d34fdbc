"""`reftune eval`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from reftune.cli.common_options import Device, Dtype, Model
from reftune.errors import ReftuneError


class Scored(str, Enum):
    """`--scoring`."""

    generate = "generate"
    options = "options"


class Form(str, Enum):
    """`--options`."""

    label = "label"
    text = "text"


_HELD_OUT, _TASKS = "Held-out rows", "Tasks"


def evaluate(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="DIR", help="Adapter folder: the --output of `reftune train`; with --base-only a base model."
        ),
    ],
    test_file: Annotated[
        str | None,
        typer.Option(
            help="Loss and exact match on rows that training did not see; the formats of --train-file.",
            rich_help_panel=_HELD_OUT,
        ),
    ] = None,
    columns: Annotated[
        str | None,
        typer.Option(help="Names of your columns: prompt=question,completion=answer.", rich_help_panel=_HELD_OUT),
    ] = None,
    split: Annotated[str, typer.Option(help="Split of a Hub dataset.", rich_help_panel=_HELD_OUT)] = "train",
    generate: Annotated[
        bool, typer.Option(help="Answer greedily and count exact matches.", rich_help_panel=_HELD_OUT)
    ] = True,
    task: Annotated[
        str | None,
        typer.Option(
            metavar="NAME[,NAME]",
            help="Accuracy on the paper's tasks: boolq, piqa, siqa, hellaswag, winogrande, arc_easy, arc_challenge, "
            "openbookqa (together: commonsense); aqua, gsm8k, mawps, svamp, addsub, multiarith, singleeq (together: "
            "arithmetic); instruct writes answers for AlpacaEval; options takes any file of {prompt, options, answer}.",
            rich_help_panel=_TASKS,
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="The task's file (LLM-Adapters' format or the Hub dataset's columns), or a folder with one for each "
            "task; default: the Hub dataset.",
            rich_help_panel=_TASKS,
        ),
    ] = None,
    scoring: Annotated[
        Scored, typer.Option(help="Read a generated answer, or take the likeliest option.", rich_help_panel=_TASKS)
    ] = Scored.generate,
    options: Annotated[
        Form,
        typer.Option(
            help="With --scoring options: the options' names as in training ('the correct answer is answer2') or "
            "their texts, the question asked without them.",
            rich_help_panel=_TASKS,
        ),
    ] = Form.label,
    template: Annotated[
        str | None,
        typer.Option(
            metavar="trained|paper|TEXT",
            help="Prompt around an instruction: as in training, the paper's, or a text with one %s; default: trained "
            "where DIR says how that was, else paper.",
            rich_help_panel=_TASKS,
        ),
    ] = None,
    greedy: Annotated[
        bool,
        typer.Option("--greedy", help="Take the likeliest token also where the paper samples.", rich_help_panel=_TASKS),
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.", rich_help_panel=_TASKS)] = 0,
    limit_rows: Annotated[int | None, typer.Option(help="Only the first so many rows (of each task).", min=1)] = None,
    batch_size: Annotated[int, typer.Option(help="Rows of one forward pass.", min=1)] = 8,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            help="Longest answer, in tokens; default: 128 for the exact match, the paper's for a task.", min=1
        ),
    ] = None,
    base: Annotated[bool, typer.Option(help="Score the base model beside it.")] = True,
    base_only: Annotated[
        bool, typer.Option("--base-only", help="DIR is a base model (name or folder): score it alone, on tasks.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Write scores and answers: a JSON file with --test-file; with --task a folder of JSONL files, from "
            "which an interrupted evaluation goes on."
        ),
    ] = None,
    model: Model = None,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Held-out loss and exact match, or accuracy on tasks, of an adapter beside its base model."""
    if (test_file is None) == (task is None):
        raise ReftuneError("give one of --test-file (loss and exact match) and --task (accuracy)")
    if task is not None:
        _evaluate_tasks(
            folder, task, data, scoring, options, template, greedy, seed, limit_rows, batch_size, max_new_tokens,
            base, base_only, out, model, dtype, device,
        )  # fmt: skip
        return
    assert test_file is not None
    if base_only:
        raise ReftuneError(
            "--base-only scores tasks: give --task; with --test-file the base stands beside the edited model"
        )
    from reftune.inference.classifying import is_classifier

    if is_classifier(folder):
        from reftune.cli.classifier_scores import evaluate_classifier

        evaluate_classifier(
            folder, test_file, columns, split, limit_rows, batch_size, out, model, dtype, device
        )  # fmt: skip
        return
    import json

    from reftune.data.formats import read_examples
    from reftune.evaluation.heldout import evaluate_rows
    from reftune.inference.generation import GenerationSettings
    from reftune.inference.loading import load_edited
    from reftune.output.files import write_text
    from reftune.runs.output_folder import readable_disk_errors
    from reftune.runs.recipe_values import read_columns

    settings = GenerationSettings(max_new_tokens=max_new_tokens or 128, batch_size=batch_size)
    rows = read_examples(test_file, columns=read_columns(columns), split=split, limit=limit_rows)
    edited = load_edited(folder, model=model, dtype=dtype, device=device)
    names = ["base", "edited"] if base else ["edited"]
    scores = {name: evaluate_rows(edited, rows, settings, base=name == "base", generate=generate) for name in names}

    table = Table(
        title=f"{test_file}: {len(rows)} rows, {scores['edited'].tokens} supervised tokens", title_justify="left"
    )
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right")
    table.add_row("loss (nats a supervised token)", *(f"{scores[name].loss:.4f}" for name in names))
    table.add_row("perplexity", *(f"{scores[name].perplexity:.3f}" for name in names))
    if generate:
        table.add_row("exact match", *(f"{scores[name].exact_match:.1%}" for name in names))
    console = Console()
    console.print(table)
    if out is not None:
        record: dict[str, object] = {"test_file": test_file, "rows": len(rows)}
        record |= {name: score.as_dict() for name, score in scores.items()}
        if generate:
            answers = {name: score.answers or [] for name, score in scores.items()}
            record["answers"] = [
                {"completion": row.completion, **{name: answers[name][index] for name in names}}
                for index, row in enumerate(rows)
            ]
        with readable_disk_errors(out.parent):
            out.parent.mkdir(parents=True, exist_ok=True)
            write_text(out, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
        console.print(f"Written to {out}", markup=False, highlight=False, soft_wrap=True)


def _evaluate_tasks(
    folder: Path,
    task: str,
    data: str | None,
    scoring: Scored,
    options: Form,
    template: str | None,
    greedy: bool,
    seed: int,
    limit_rows: int | None,
    batch_size: int,
    max_new_tokens: int | None,
    base: bool,
    base_only: bool,
    out: Path | None,
    model: str | None,
    dtype: str | None,
    device: str | None,
) -> None:
    from reftune.cli.results import task_table
    from reftune.evaluation.task_report import SUMMARY, base_alone, default_template, evaluate_tasks
    from reftune.evaluation.tasks import expand_names
    from reftune.inference.loading import load_edited

    expand_names(task)  # a misspelt name costs no loading
    if out is not None and out.is_file():
        raise ReftuneError(f"--out {out} is a file; with --task it is a folder")
    if base_only:
        edited = base_alone(str(folder), dtype, device)
    else:
        edited = load_edited(folder, model=model, dtype=dtype, device=device)
    report = evaluate_tasks(
        edited,
        task,
        data,
        models=["base"] if base_only else ["base", "edited"] if base else ["edited"],
        scoring=scoring.value,
        form=options.value,
        template=default_template(edited.folder) if template is None else None if template == "trained" else template,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        greedy=greedy,
        seed=seed,
        limit=limit_rows,
        out=out,
        progress=True,
    )
    console = Console()
    console.print(task_table(report))
    if out is not None:
        console.print(f"Written to {out / SUMMARY}", markup=False, highlight=False, soft_wrap=True)
