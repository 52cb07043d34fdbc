"""`reftune train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from reftune.cli.flags import with_flags
from reftune.output import terminal
from reftune.runs.processes import as_launched
from reftune.runs.recipe import TrainRecipe, resolve_recipe
from reftune.runs.recipe_values import typed_fields


def train(
    recipe: Annotated[
        Path | None,
        typer.Argument(help="YAML recipe, or the output folder of an earlier run. Flags override its keys."),
    ] = None,
    **flags: Any,
) -> None:
    """Train an adapter and write it, with its metrics, loss curve, recipe and card, into --output.

    Every flag is also a key of the recipe, with underscores (gradient_accumulation: 4).
    """
    resolved = as_launched(resolve_recipe(recipe, flags))  # before the libraries are loaded: a wrong flag is told now
    if not resolved.quiet:
        told = f"Training {resolved.model} on {resolved.train_file}, into {resolved.output} ..."
        terminal.console(stderr=True).print(told, markup=False, highlight=False, soft_wrap=True)
    from reftune.cli.results import print_training, print_users
    from reftune.runs import run_training
    from reftune.users.run import run_users

    console = terminal.console()
    if resolved.adapter_column is None:
        print_training(run_training(resolved), console)
    else:
        print_users(run_users(resolved), console)


with_flags(train, typed_fields(TrainRecipe))
