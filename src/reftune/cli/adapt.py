"""`reftune adapt`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from reftune.cli.flags import with_flags
from reftune.errors import ReftuneError
from reftune.output import terminal
from reftune.runs.recipe import ADAPTED, BIAS_RATE, OWN_OF_A_USER, TrainRecipe
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
    terminal.console(stderr=True).print(f"Adding {user} to {folder} ...", markup=False, highlight=False, soft_wrap=True)
    from reftune.users.adapt import adapt_user

    found = adapt_user(folder, user, file, **settings)
    rows, steps, loss = found["train_rows"], found["steps"], found["train_loss"]
    held_out = "" if found["eval_loss"] is None else f", held-out loss {found['eval_loss']:.4f}"
    told = f"{user}: {rows} rows, {steps} steps, training loss {loss:.4f}{held_out}. Saved in {folder}."
    terminal.console().print(told, markup=False, highlight=False, soft_wrap=True)


_TEXTS = {
    "train_file": "The user's rows, alone or among others' (--adapter-column): CSV, TSV, JSON(L), Parquet, Hub name.",
    "eval_file": "File of the user's held-out rows; the best epoch by their loss is kept.",
    "eval_fraction": "Hold out this share of the user's rows.",
    "adapter_column": "Column that says whose row it is, where the file has other users' rows too.",
    "lr": f"Peak learning rate of what users share, of which the bias takes {BIAS_RATE:g} times, without --bias-lr.",
    "bias_lr": "Peak learning rate of the bias.",
    "seed": "Seed of row order, dropout and held-out rows.",
}
"""What `reftune train` says otherwise."""
_fields = [(item, kind) for item, kind in typed_fields(TrainRecipe) if item.name in ADAPTED]
with_flags(
    adapt,
    _fields,
    _TEXTS,
    **{n: "as the store's users" for n in ADAPTED if n not in (*OWN_OF_A_USER, "split", "device", "dtype")},
)
