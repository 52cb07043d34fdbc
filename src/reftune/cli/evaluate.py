"""`reftune eval`."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal

import typer
from rich.table import Table

from reftune.cli.common_options import BASE_MODEL
from reftune.cli.flags import with_flags
from reftune.errors import ReftuneError
from reftune.inference.settings import BaseModel, GenerationSettings
from reftune.output import terminal
from reftune.output.targets import check_file_target, check_folder_target, result_with
from reftune.runs.recipe_values import as_flags, option, read_columns, read_flags, typed_fields

_HELD_OUT, _TASKS, _EFFECTS, _BOTH = "Held-out rows", "Tasks", "Side effects", "Options"


@dataclass(frozen=True)
class EvalOptions:
    """What is evaluated, on which rows, and where the results go."""

    test_file: str | None = option(
        None, _HELD_OUT, "Loss and exact match on rows that training did not see; the formats of --train-file.", "file"
    )
    columns: str | None = option(None, _HELD_OUT, "Names of your columns: prompt=question,completion=answer.")
    split: str = option("train", _HELD_OUT, "Split of a Hub dataset.")
    generate: bool = option(True, _HELD_OUT, "Answer greedily and count exact matches.")
    judge: str | None = option(
        None, _HELD_OUT,
        "Who accepts answers: a classifier's folder (FOLDER:CLASS), module:function or file.py:function.",
    )  # fmt: skip
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
        "generate", _TASKS, "Read a generated answer, or take the most likely option."
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
    side_effects: bool = option(
        False, _EFFECTS,
        "Forgetting, KL divergence from the base, repetition and refusals on plain prompts, and nothing else.",
    )  # fmt: skip
    refusal_judge: str | None = option(
        None, _EFFECTS, "Who says that an answer is a refusal, as for --judge; default: its first words."
    )
    refusal_file: str | None = option(
        None,
        _EFFECTS,
        "Prompts (text or prompt) with the label harmless or harmful: the share of each refused.",
        "file",
    )
    neutral_file: str | None = option(
        None, _EFFECTS, "Plain prompts with plain answers; default: 40 that come with reftune.", "file"
    )
    chat_template_kwargs: str | None = option(
        None, _BOTH, "Arguments of the chat template, as in enable_thinking=false; default: those of training."
    )
    greedy: bool = option(False, _TASKS, "Take the most likely token also where the paper samples.")
    seed: int = option(0, _TASKS, "Seed of the sampling.")
    limit_rows: int | None = option(None, _BOTH, "Only the first so many rows (of each task).", "rows", least=1)
    batch_size: int = option(8, _BOTH, "Rows of one forward pass.", "rows", least=1)
    max_new_tokens: int | None = option(
        None,
        _BOTH,
        "Longest answer; default: 128 for the exact match, 64 for side effects, the paper's for a task.",
        "tokens",
        least=1,
    )
    jobs: int = option(
        1, _TASKS, "Tasks at a time, each in a process: they take GPUs in turn, or share the CPU.", "tasks", least=1
    )
    base: bool = option(True, _BOTH, "Score the base model beside it.")
    base_only: bool = option(False, _BOTH, "DIR is a base model (name or folder): score it alone, on tasks.")
    out: str | None = option(
        None, _BOTH,
        "Write scores and answers: a JSON file with --test-file or --side-effects; with --task a folder of JSONL "
        "files, from which an interrupted evaluation goes on.",
        "path",
    )  # fmt: skip


def evaluate(
    folder: Annotated[
        str,
        typer.Argument(
            metavar="DIR",
            help="Adapter folder, or several with strengths, as in '0.5*pirate + 0.3*formal'; with --base-only a base "
            "model.",
        ),
    ],
    **flags: Any,
) -> None:
    """Held-out loss and exact match, accuracy on tasks, or side effects, of an adapter beside its base model."""
    options, base_model = read_flags(EvalOptions, flags), read_flags(BaseModel, flags)
    if [options.test_file is None, options.task is None, not options.side_effects].count(False) != 1:
        raise ReftuneError(
            "give one of --test-file (loss and exact match), --task (accuracy) and --side-effects (on plain prompts)"
        )
    if not options.side_effects and (options.refusal_file or options.neutral_file or options.refusal_judge):
        raise ReftuneError("--refusal-file, --neutral-file and --refusal-judge belong to --side-effects: give that too")
    if options.refusal_judge and not options.refusal_file:
        raise ReftuneError("--refusal-judge judges answers to --refusal-file: give that too")
    if options.judge and (options.test_file is None or not options.generate):
        raise ReftuneError("--judge judges the answers to --test-file: give that, and leave --no-generate out")
    if options.task is not None:
        return _evaluate_tasks(folder, options.task, options, base_model)
    if options.base_only:
        raise ReftuneError("--base-only scores tasks: give --task; otherwise the base stands beside the edited model")
    if options.out is not None:
        files = [options.test_file, options.refusal_file, options.neutral_file]
        key = "test_file" if options.test_file else "side_effects"
        check_file_target(Path(options.out), "--out", files, ours=result_with(key))
    from reftune.inference.classifying import is_classifier
    from reftune.inference.loading import adapter_folders

    first = adapter_folders(folder)[0][0]
    if options.judge and is_classifier(first):
        raise ReftuneError("--judge judges written answers, and a classifier writes none")
    if options.test_file is None:
        table, record = _side_effects(folder, options, base_model)
    else:
        score = _score_classifier if is_classifier(first) else _score_rows
        table, record = score(folder, options.test_file, options, base_model)
        record = {"test_file": options.test_file, **record}
    console = terminal.console()
    console.print(table)
    if options.out is not None:
        from reftune.cli.results import write_out

        record = {"adapter": folder, **record}
        write_out(Path(options.out), json.dumps(record, indent=2, ensure_ascii=False) + "\n", console)


def _score_rows(
    folder: str, test_file: str, options: EvalOptions, base_model: BaseModel
) -> tuple[Table, dict[str, Any]]:
    """Loss and exact match: a table, and what the results file holds."""
    from reftune.data.formats import read_examples
    from reftune.evaluation.heldout import evaluate_rows
    from reftune.evaluation.judging import accepted_share, load_judge
    from reftune.inference.loading import adapter_folders, load_mixture, recorded_run

    judge = None if options.judge is None else load_judge(options.judge)
    settings = GenerationSettings(max_new_tokens=options.max_new_tokens or 128, batch_size=options.batch_size)
    rows = read_examples(
        test_file,
        columns=read_columns(options.columns),
        usual=read_columns(recorded_run(adapter_folders(folder)[0][0]).get("columns")),
        split=options.split,
        limit=options.limit_rows,
    )
    edited = load_mixture(folder, chat_template_kwargs=options.chat_template_kwargs, **asdict(base_model))
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
        if judge is not None:
            shares = {name: accepted_share(judge, found) for name, found in answers.items()}
            table.add_row("accepted by the judge", *(f"{share:.1%}" for share in shares.values()))
            record["accepted"] = shares
        record["answers"] = [
            {"completion": row.completion, **{name: answers[name][index] for name in names}}
            for index, row in enumerate(rows)
        ]
    return table, record


def _side_effects(folder: str, options: EvalOptions, base_model: BaseModel) -> tuple[Table, dict[str, Any]]:
    """What the edit does on plain prompts: a table, and what the results file holds."""
    from reftune.data.persona import neutral_rows
    from reftune.evaluation.judging import load_judge
    from reftune.evaluation.side_effects import SHOWN, AgainstBase, measure_side_effects, read_refusal_rows
    from reftune.inference.loading import load_mixture

    neutral = neutral_rows(options.neutral_file)[: options.limit_rows]
    refusals = [] if options.refusal_file is None else read_refusal_rows(options.refusal_file)
    refuses = None if options.refusal_judge is None else load_judge(options.refusal_judge)
    settings = GenerationSettings(max_new_tokens=options.max_new_tokens or 64, batch_size=options.batch_size)
    edited = load_mixture(folder, chat_template_kwargs=options.chat_template_kwargs, **asdict(base_model))
    rows: Any = edited.encoding.dataset(neutral).to_list()
    with edited.model.disable_adapter():
        against = AgainstBase(edited.model, rows, int(edited.tokenizer.pad_token_id), options.batch_size)  # type: ignore[arg-type]
    found = {
        name: measure_side_effects(
            edited, against, neutral, settings, refusals=refusals, refuses=refuses, base=name == "base"
        ).as_dict()
        for name in (["base", "edited"] if options.base else ["edited"])
    }
    table = Table("", *found, title=f"Side effects on {len(neutral)} plain prompts", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    shown = {"neutral_loss": ("Neutral loss", "nats a token", "{:.4f}"), **SHOWN}
    for name, (heading, unit, form) in shown.items():
        if name in found["edited"]:
            table.add_row(f"{heading} ({unit})", *(form.format(one[name]) for one in found.values()))
    return table, {"side_effects": found, "rows": len(neutral), "refusal_rows": len(refusals)}


def _score_classifier(
    folder: str, test_file: str, options: EvalOptions, base_model: BaseModel
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


def _evaluate_tasks(folder: str, task: str, options: EvalOptions, base_model: BaseModel) -> None:
    from reftune.cli.results import task_table
    from reftune.evaluation.task_report import SUMMARY, base_alone, default_template, evaluate_apart, evaluate_tasks
    from reftune.evaluation.tasks import expand_names
    from reftune.inference.loading import adapter_folders, load_mixture

    tasks = expand_names(task)  # a misspelt name costs no loading
    folders = [folder] if options.base_only else [of for of, _ in adapter_folders(folder)]
    out = None if options.out is None else Path(options.out)
    if out is not None and out.is_file():
        raise ReftuneError(f"--out {out} is a file; with --task it is a folder")
    if out is not None:
        check_folder_target(out, "--out ", ["*.settings.json"], [*folders, options.data])
    with TemporaryDirectory() if out is None and options.jobs > 1 else nullcontext(out) as place:
        place = None if place is None else Path(place)
        if options.jobs > 1:
            alone = {name: replace(options, task=name, out=str(place), jobs=1) for name in tasks}
            start = [sys.executable, "-m", "reftune", "eval"]
            commands = {
                name: [*start, *as_flags(one), *as_flags(base_model), "--", folder] for name, one in alone.items()
            }
            evaluate_apart(commands, options.jobs, base_model.device)
        if options.base_only:
            edited = base_alone(folder, base_model.dtype, base_model.device, options.chat_template_kwargs)
        else:
            edited = load_mixture(folder, chat_template_kwargs=options.chat_template_kwargs, **asdict(base_model))
        template = default_template(edited.folder) if options.template is None else options.template
        report = evaluate_tasks(
            edited,
            task,
            options.data,
            models=["base"] if options.base_only else ["base", "edited"] if options.base else ["edited"],
            scoring=options.scoring,
            form=options.options,
            template=None if template == "trained" else template,
            batch_size=options.batch_size,
            max_new_tokens=options.max_new_tokens,
            greedy=options.greedy,
            seed=options.seed,
            limit=options.limit_rows,
            out=place,
            progress=True,
        )
    console = terminal.console()
    console.print(task_table(report))
    if out is not None:
        console.print(f"Written to {out / SUMMARY}", markup=False, highlight=False, soft_wrap=True)


with_flags(evaluate, typed_fields(EvalOptions) + BASE_MODEL)
