"""`reftune info`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from reftune.output import terminal
from reftune.users.names import is_store

if TYPE_CHECKING:
    from reftune.adapter.info import AdapterInfo

_EDITED, _LEFT = "\N{BLACK CIRCLE}", "\N{MIDDLE DOT}"


def info(
    folder: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="Adapter folder: the --output of `reftune train`; or a store of users."),
    ],
) -> None:
    """What an adapter edits: layers by positions, norms, parameters. Loads no base model."""
    from reftune.adapter.info import read_adapter_info
    from reftune.adapter.signing import signature_state

    folder = folder.expanduser()
    if is_store(folder):
        from reftune.cli.store import summary
        from reftune.users.store import UserStore

        terminal.console().print(summary(UserStore.open(folder)), highlight=False)
        return
    found = read_adapter_info(folder)
    settings, console = found.settings, terminal.console()
    facts = Table(show_header=False, box=None, pad_edge=False)
    base = str(settings.get("base_model_name_or_path") or "not recorded")
    facts.add_row("base model", Text(terminal.visible(base)))
    act_fn = f", act_fn {settings['act_fn']}" if settings.get("act_fn") else ""
    facts.add_row("method", Text(terminal.visible(f"{settings['method']}, rank {settings['r']}{act_fn}")))
    facts.add_row("component", Text(terminal.visible(str(settings["component"]))))
    facts.add_row("positions", found.positions.text)
    facts.add_row("parameters", f"{found.parameters:,} in {len(found.edits)} edit{'s' if len(found.edits) > 1 else ''}")
    facts.add_row("file", f"{found.file_bytes:,} bytes")
    facts.add_row("signature", Text(terminal.visible(signature_state(folder))))
    console.print(facts, highlight=False)
    console.print(_map(found))
    if all(edit.linear_norm is not None for edit in found.edits):
        console.print("An edit makes h into h + hM + c; |M| and |c| are their norms.", style="dim", highlight=False)


def _map(found: AdapterInfo) -> Table:
    """One row an edit: which tokens it touches and how large it is."""
    columns = _position_columns(found)
    table = Table(title="layers x positions", title_justify="left")
    table.add_column("layer", justify="right")
    for name, _ in columns:
        table.add_column(name, justify="center")
    table.add_column("parameters", justify="right")
    linear = all(edit.linear_norm is not None for edit in found.edits)
    tensors = [] if linear else sorted({name for edit in found.edits for name in edit.norms})
    for name in ["M", "c"] if linear else tensors:
        table.add_column(f"|{name}|", justify="right")
    for edit in found.edits:
        marks = [_EDITED if edit.part in parts else _LEFT for _, parts in columns]
        sizes = [_number(edit.linear_norm), _number(edit.constant_norm)] if linear else []
        norms = [_number(edit.norms.get(name)) for name in tensors]
        layer = edit.block if edit.layer is None else str(edit.layer)
        table.add_row(Text(terminal.visible(layer)), *marks, f"{edit.parameters:,}", *sizes, *norms)
    return table


def _position_columns(found: AdapterInfo) -> list[tuple[str, tuple[str, ...]]]:
    """The stretches of a row from its first token to its last, each with the parts of an edit that touch it."""
    positions, every = found.positions, ("both", "prefix", "suffix")
    after = ("answer", ("both", "suffix") if positions.generated else ())
    if not positions.prefix and not positions.suffix:
        return [("prompt", every if positions.prompt else ()), after]
    columns: list[tuple[str, tuple[str, ...]]] = []
    if positions.prefix:
        columns.append((f"first {positions.prefix}", ("both", "prefix")))
    columns.append(("rest", ()))
    if positions.suffix:
        columns.append((f"last {positions.suffix}", ("both", "suffix")))
    return [*columns, after]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
