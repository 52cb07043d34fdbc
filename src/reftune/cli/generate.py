"""`reftune generate`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from reftune.cli.common_options import BASE_MODEL, SAMPLED, Adapters, ChatTemplateKwargs, SystemPrompt
from reftune.cli.flags import with_flags
from reftune.errors import ReftuneError
from reftune.inference.settings import WRITING, BaseModel, GenerationSettings
from reftune.output import terminal
from reftune.runs.recipe_values import read_columns, read_flags

_PROMPTS = "Prompts"


def generate(
    folder: Adapters,
    prompt: Annotated[
        list[str] | None, typer.Option(help="A prompt; may be given several times.", rich_help_panel=_PROMPTS)
    ] = None,
    prompts_file: Annotated[
        Path | None,
        typer.Option(
            help="Prompts: JSONL, JSON, CSV, TSV or Parquet, or TXT with one a line.", rich_help_panel=_PROMPTS
        ),
    ] = None,
    column: Annotated[
        str | None,
        typer.Option(
            help="Column of --prompts-file that holds them; default: as in training.", rich_help_panel=_PROMPTS
        ),
    ] = None,
    limit_rows: Annotated[
        int | None, typer.Option(help="Answer only the first so many prompts.", min=1, rich_help_panel=_PROMPTS)
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write prompts and answers to this JSONL file.", rich_help_panel=_PROMPTS)
    ] = None,
    compare_base: Annotated[
        bool,
        typer.Option("--compare-base", help="Answer without the edit too, side by side.", rich_help_panel=WRITING),
    ] = False,
    system_prompt: SystemPrompt = None,
    chat_template_kwargs: ChatTemplateKwargs = None,
    **flags: Any,
) -> None:
    """Answer prompts with an adapter, or with several at once."""
    settings = read_flags(GenerationSettings, flags)
    from reftune.cli.results import side_by_side, write_out
    from reftune.inference.generation import generate_answers
    from reftune.inference.loading import adapter_folders, load_mixture, recorded_run
    from reftune.inference.prompts import read_prompts, text_prompt, to_jsonl
    from reftune.output.targets import check_file_target, result_with

    if out is not None:
        check_file_target(out, "--out", [prompts_file], ours=result_with("answer"))
    rows = [text_prompt(text, "--prompt") for text in prompt or []]
    if prompts_file is not None:
        first = adapter_folders(folder)[0][0]
        rows += read_prompts(prompts_file, column, limit_rows, read_columns(recorded_run(first).get("columns")))
    if not rows:
        raise ReftuneError("There is nothing to answer: give --prompt TEXT or --prompts-file FILE.")

    spoken_to = {"system_prompt": system_prompt, "chat_template_kwargs": chat_template_kwargs}
    edited = load_mixture(folder, **spoken_to, **asdict(read_flags(BaseModel, flags)))
    prompts = [row.prompt for row in rows]
    answers = generate_answers(edited, prompts, settings)
    console = terminal.console()
    if out is None and not compare_base:  # each as soon as it is there
        for row, answer in zip(rows, answers, strict=True):
            if len(rows) > 1:
                console.print(f"> {row.shown}", style="bold", markup=False, highlight=False, soft_wrap=True)
            console.print(answer.text, markup=False, highlight=False, soft_wrap=True)
        return
    written = [answer.text for answer in answers]
    plain = [answer.text for answer in generate_answers(edited, prompts, settings, base=True)] if compare_base else None
    if plain is not None:
        console.print(side_by_side([row.shown for row in rows], plain, written))
    if out is not None:
        records = [{**row.row, "answer": text, "adapter": str(folder)} for row, text in zip(rows, written, strict=True)]
        if plain is not None:
            records = [{**record, "base_answer": text} for record, text in zip(records, plain, strict=True)]
        write_out(out, to_jsonl(records), console, f"{len(records)} answers in")


with_flags(generate, SAMPLED + BASE_MODEL)
