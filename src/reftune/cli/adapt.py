"""`reftune adapt`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from reftune.cli.flags import with_flags
from reftune.errors import ReftuneError
from reftune.output import terminal
from reftune.runs.recipe import ADAPTED, OWN_OF_A_USER, TrainRecipe
from reftune.runs.recipe_values import given, typed_fields
from reftune.users.names import check_user_name, is_store


def adapt(
    folder: Annotated[
        Path,
        typer.Argument(metavar="STORE", help="The --output of `reftune train --adapter-column ... --share rotation`."),
    ],
    user: Annotated[str, typer.Option(help="Who is added, or replaced.")],
    **flags: Any,
) -> None:
    """Add a user to a store with a shared part, or train one anew: a bias, in seconds; the shared part stays."""
    check_user_name(user)
    if not is_store(folder.expanduser()):
        raise ReftuneError(
            f"{folder} is no store of users; `reftune train --adapter-column ... --share rotation` makes one."
        )
    settings = given(flags)
    if (file := settings.pop("train_file", None)) is None:
        raise ReftuneError("There is nothing to train on: give --train-file FILE.")
    from reftune.users.adapt import adapt_user

    found = adapt_user(folder, user, file, **settings)
    rows, steps, loss = found["train_rows"], found["steps"], found["train_loss"]
    held_out = "" if found["eval_loss"] is None else f", held-out loss {found['eval_loss']:.4f}"
    told = f"{user}: {rows} rows, {steps} steps, training loss {loss:.4f}{held_out}. Saved in {folder}."
    terminal.console().print(told, markup=False, highlight=False, soft_wrap=True)


_fields = [(item, kind) for item, kind in typed_fields(TrainRecipe) if item.name in ADAPTED]
with_flags(
    adapt,
    _fields,
    **{n: "as the store's users" for n in ADAPTED if n not in (*OWN_OF_A_USER, "split", "device", "dtype")},
)
