"""`reftune compare`."""

from __future__ import annotations

import webbrowser
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.measure import Measurement
from rich.table import Table

from reftune.cli.flags import with_flags
from reftune.errors import ReftuneError
from reftune.output import terminal
from reftune.runs.recipe import TrainRecipe
from reftune.runs.recipe_values import typed_fields

if TYPE_CHECKING:
    from reftune.comparison.summary import MethodSummary
    from reftune.comparison.tables import Column

_IN_PLACE_OF_THE_RECIPE_S = (
    "train_file", "eval_file", "eval_fraction", "limit_rows", "model", "epochs", "output",
)  # fmt: skip


def compare(
    recipe: Annotated[
        Path, typer.Argument(metavar="RECIPE", help="YAML recipe, or the folder of an earlier comparison.")
    ],
    seeds: Annotated[str | None, typer.Option(help="Seeds, such as 0,1,2, in place of the recipe's.")] = None,
    jobs: Annotated[
        int,
        typer.Option(
            help="Runs at a time: each takes a GPU in turn, or its share of the CPU, which its seconds show.", min=1
        ),
    ] = 1,
    only: Annotated[list[str] | None, typer.Option(help="Run this method only; may be given several times.")] = None,
    report_only: Annotated[bool, typer.Option("--report-only", help="Run nothing; write the report again.")] = False,
    in_process: Annotated[
        bool,
        typer.Option(
            "--in-process",
            help="Run one after another in this process: starts sooner, but memory is not measured on the CPU.",
        ),
    ] = False,
    share_prefixes: Annotated[
        bool,
        typer.Option(
            "--share-prefixes",
            help="Let edits use what earlier runs computed of the frozen model (implies --in-process): sooner done, "
            "but their seconds are no longer those of a lone run.",
        ),
    ] = False,
    system_prompt: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="Also judge the base model behind this instruction (the method 'prompted')."),
    ] = None,
    few_shot: Annotated[
        str | None,
        typer.Option(metavar="K", help="Also judge it behind so many rows of training (the method 'few-shot')."),
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(
            metavar="JUDGE",
            help="Share of greedy answers that this accepts: module:function, file.py:function, FOLDER:CLASS.",
        ),
    ] = None,
    side_effects: Annotated[
        bool,
        typer.Option(
            "--side-effects",
            help="Measure forgetting, KL divergence from the base and repetition on neutral prompts; takes a while.",
        ),
    ] = False,
    refusal_file: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="And refusals: prompts (text or prompt) labelled harmless or harmful."),
    ] = None,
    show: Annotated[bool, typer.Option("--open", help="Open the report in the browser.")] = False,
    **flags: Any,
) -> None:
    """Train several methods on the same rows, order and budget, and write a report that compares them.

    A comparison that was interrupted goes on where it stopped; after a change to the recipe, only the runs whose
    settings changed are run again.
    """
    from reftune.comparison import resolve_comparison, run_comparison, summarise, write_report
    from reftune.comparison.tables import result_columns

    try:
        numbers = None if seeds is None else [int(part) for part in seeds.split(",")]
    except ValueError:
        raise ReftuneError(f"--seeds {seeds}: write whole numbers, such as 0,1,2.") from None
    given = {
        "prompted": None if system_prompt is None else {"method": "prompted", "text": system_prompt},
        "few-shot": None if few_shot is None else {"method": "few-shot", "examples": few_shot},
    }
    more = {name: keys for name, keys in given.items() if keys is not None}
    asked = {"seeds": numbers, "side_effects": side_effects or None, "refusal_file": refusal_file, "judge": judge}
    resolved = resolve_comparison(recipe, {**flags, **asked}, more=more)
    comparison = run_comparison(
        resolved,
        jobs=jobs,
        only=only or (),
        own_processes=not (in_process or share_prefixes),
        share_prefixes=share_prefixes,
        report_only=report_only,
    )
    summaries = summarise(comparison)  # once: it asks the judge
    page, text = write_report(comparison, summaries)
    columns = result_columns(resolved, summaries)
    console = terminal.console()
    tables = [_table(resolved.title, summaries, columns[:count]) for count in range(1, len(columns) + 1)]
    unbounded = console.options.update(width=10_000)
    fitting = [table for table in tables if Measurement.get(console, unbounded, table).maximum <= console.width]
    table = max(fitting, key=lambda table: len(table.columns), default=tables[0])
    console.print(table)
    if left_out := [column.heading for column in columns[len(table.columns) - 1 :]]:
        console.print(f"In the report, for want of room here: {', '.join(left_out)}", soft_wrap=True, highlight=False)
    console.print(f"Report: {page} (and {text.name})", soft_wrap=True, highlight=False, markup=False)
    if show:
        webbrowser.open(page.resolve().as_uri())
    if comparison.failed:
        lines = [f"{run}: {why}" for run, why in comparison.failed.items()]
        raise ReftuneError("Some runs failed; the report leaves them out.\n  " + "\n  ".join(lines))


def _table(title: str, summaries: Sequence[MethodSummary], columns: Sequence[Column]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("method")
    for column in columns:
        table.add_column(f"{column.heading}\n({column.unit})", justify="right")
    for index, item in enumerate(summaries):
        cells = [f"{c.cells[index]}\n{c.notes[index]}".strip() for c in columns]
        table.add_row(item.name, *cells, end_section=True)
    return table


with_flags(compare, [item for item in typed_fields(TrainRecipe) if item[0].name in _IN_PLACE_OF_THE_RECIPE_S])
