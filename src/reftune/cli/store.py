"""`reftune store`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from reftune.adapter.signing import signature_state
from reftune.errors import ReftuneError
from reftune.output import terminal

if TYPE_CHECKING:
    from reftune.users.store import UserStore

_ACTIONS = {"list": (0, 0), "verify": (0, 0), "export": (1, 2), "import": (1, 2), "delete": (1, None)}


def store(
    action: Annotated[str, typer.Argument(metavar="|".join(_ACTIONS), help="What to do.")],
    folder: Annotated[Path, typer.Argument(metavar="STORE", help="The store's folder.")],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[...]",
            help="export NAME [DIR], import DIR [NAME], delete NAME...; the name or folder that is left out is the "
            "other's own name. import makes the store where there is none.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """The users of a store: list or verify them, export or import one as an adapter folder, delete some."""
    given = arguments or []
    if action not in _ACTIONS:
        raise ReftuneError(f"{action}: say one of {', '.join(_ACTIONS)}.")
    least, most = _ACTIONS[action]
    if len(given) < least or (most is not None and len(given) > most):
        wanted = "nothing more" if most == 0 else f"{least} to {most} arguments" if most else "at least one name"
        raise ReftuneError(f"store {action} {folder}: takes {wanted}; see `reftune store --help`.")
    from reftune.users.store import UserStore, import_folder

    console = terminal.console()
    if action == "import":
        place = Path(given[0]).expanduser()
        name = given[1] if len(given) > 1 else place.resolve().name
        import_folder(folder, place, name)
        result, told = {"imported": name}, f"Imported {place} as {name!r}."
    else:
        found = UserStore.open(folder)
        if action == "list":
            _list(found, as_json)
            return
        if action == "verify":
            problems = found.verify()
            result = {"users": len(found), "problems": problems}
            told = "\n".join(problems) or f"{len(found):,} users are as they were written."
        elif action == "export":
            place = Path(given[1] if len(given) > 1 else given[0])
            found.export(given[0], place)
            result, told = {"exported": str(place)}, f"Exported {given[0]!r} to {place}."
        else:
            found.delete(*given)
            result, told = {"deleted": given}, f"Deleted {len(given)} of {len(found) + len(given):,} users."
    console.print(json.dumps(result) if as_json else told, markup=False, highlight=False, soft_wrap=True)
    if result.get("problems"):
        raise typer.Exit(2)


def _list(found: UserStore, as_json: bool) -> None:
    names = found.names()
    if as_json:
        typer.echo(json.dumps({"base": found.base, "config": found.config, "users": names}))
        return
    console = terminal.console()
    console.print(summary(found), highlight=False)
    for name in names:
        console.print(name, markup=False, highlight=False, soft_wrap=True)


def summary(found: UserStore) -> Table:
    """What all users of a store have in common, and how many they are."""
    settings = found.config
    facts = Table(show_header=False, box=None, pad_edge=False)
    facts.add_row("base model", Text(terminal.visible(found.base)))
    facts.add_row("method", Text(terminal.visible(f"{settings['method']}, rank {settings['r']}")))
    layers = settings["layers_to_transform"]
    facts.add_row("sites", Text(terminal.visible(f"{settings['component']}, layers {layers}")))
    facts.add_row("positions", settings["positions"])
    facts.add_row("users", f"{len(found):,}, {found.user_bytes:,} bytes each")
    facts.add_row("shared part", f"{found.shared_bytes:,} bytes" if found.shared_bytes else "none")
    facts.add_row("signature", Text(terminal.visible(signature_state(found.path))))
    return facts
