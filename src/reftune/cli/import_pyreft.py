"""`reftune import-pyreft`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from reftune.output import terminal


def import_pyreft(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What pyreft's ReftModel.save wrote.")],
    output: Annotated[Path, typer.Option("--output", help="The adapter folder to write.")],
    model: Annotated[
        str | None, typer.Option("--model", help="The base model; without it, Llama's layout is taken.")
    ] = None,
    positions: Annotated[
        str | None, typer.Option("--positions", help="Which tokens to edit, such as f7+l7; pyreft does not save them.")
    ] = None,
) -> None:
    """Turn an adapter that pyreft saved into one of this library; says what pyreft did not save."""
    from reftune.output.targets import check_folder_target
    from reftune.pyreft.importing import import_pyreft as turn

    check_folder_target(output, "--output ", ["adapter_config.json", "edit*/adapter_config.json"], [folder], model)
    console = terminal.console()
    written, assumed = turn(folder, output, model, positions)
    for one in written:
        console.print(f"Wrote {one}", markup=False, highlight=False, soft_wrap=True)
    console.print("pyreft does not save these:")
    for line in assumed:
        console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)
