"""`reftune sweep`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from reftune.cli.flags import with_flags
from reftune.errors import ReftuneError
from reftune.output import terminal
from reftune.sweeps.recipe import resolve_sweep, sweep_options

if TYPE_CHECKING:
    from reftune.sweeps.running import SweepResult

_SHOWN = 5


def sweep(
    recipe: Annotated[
        Path, typer.Argument(help="YAML recipe: keys of `reftune train`, and `search:` with lists or ranges of them.")
    ],
    more: Annotated[
        int | None,
        typer.Option(
            help="Train so many trials more than the output holds, whatever --trials says.",
            metavar="TRIALS",
            rich_help_panel="Sweep",
        ),
    ] = None,
    jobs: Annotated[
        int,
        typer.Option(
            help="Trials at a time, each job a process: they take GPUs in turn, or share the CPU.",
            min=1,
            rich_help_panel="Sweep",
        ),
    ] = 1,
    **flags: Any,
) -> None:
    """Search the settings with the lowest held-out loss; the trials share what prefix reuse computed.

    In the recipe: `search: {rank: [1, 4, 16], layers: [all, 8], lr: {low: 1e-4, high: 1e-2, log: true}}`.
    Into --output go best.yaml (a recipe for `reftune train`), best/ (the adapter), trials.csv, SWEEP.md and pictures.
    An output that holds an unfinished sweep of the same recipe is gone on with.
    """
    if more is not None and more < 1:
        raise ReftuneError(f"--more {more}: give a number of trials of at least 1.")
    resolved = resolve_sweep(recipe, flags)  # before the libraries are loaded: a wrong key is told at once
    from reftune.sweeps.running import run_sweep

    _print(run_sweep(resolved, more=more, jobs=jobs), terminal.console())


def _print(result: SweepResult, console: Console) -> None:
    from reftune.sweeps.report import PAGE_FILE, ranked_table

    names = list(result.best.settings) if result.best else []
    header, rows = ranked_table(result.trials, names, _SHOWN)
    if not rows:
        console.print(f"No trial was trained to its end; see {result.folder / 'trials.csv'}.", markup=False)
        return
    table = Table(title=f"The best of {len(result.trials)} trials", title_justify="left")
    for name in header:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    if result.importance:
        shares = ", ".join(f"{name} {share:.0%}" for name, share in result.importance.items())
        console.print(f"What matters: {shares}", highlight=False, markup=False, soft_wrap=True)
    console.print(
        f"Saved in {result.folder} (read {PAGE_FILE}). Try it: reftune chat {result.folder / 'best'}",
        soft_wrap=True,
        highlight=False,
        markup=False,
    )


with_flags(sweep, sweep_options())
