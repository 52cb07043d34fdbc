"""`reftune serve`."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from reftune.cli.flags import with_flags
from reftune.runs.recipe_values import read_flags, typed_fields
from reftune.serving.settings import SERVING, ServerSettings


def serve(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL] ...", help="Base model, a name or a folder (default: smollm2); options of vLLM."
        ),
    ] = None,
    adapters: Annotated[
        list[Path] | None,
        typer.Option(
            "--adapters",
            "-a",
            metavar="DIR",
            help="Folder of adapters, an adapter itself, or a store of users; may be given several times.",
            rich_help_panel=SERVING,
        ),
    ] = None,
    engine: Annotated[
        str,
        typer.Option(
            metavar="auto|embedded|vllm",
            help="embedded: this process, one machine. vllm: an installed vLLM, at scale. auto: vLLM where it can.",
            rich_help_panel=SERVING,
        ),
    ] = "auto",
    **flags: Any,
) -> None:
    """Serve a base model and its adapters by OpenAI's API, with a page to try them.

    Options that are not known here go to `vllm serve` (--engine vllm).
    """
    settings = read_flags(ServerSettings, flags)
    named = bool(arguments) and not arguments[0].startswith("-")
    model, extra = (arguments[0], arguments[1:]) if arguments and named else ("smollm2", arguments or [])
    from reftune.serving.choosing import choose_engine, refuse_extra, vllm_flags

    folders = [str(folder) for folder in adapters or []]
    chosen, why = choose_engine(engine, model, folders, settings)
    if why:
        typer.echo(why, err=True)
    if chosen == "vllm":
        launch = import_module("reftune.serving.vllm.launch").launch
        launch(model, folders, settings.port, settings.host, [*vllm_flags(settings), *extra])
    refuse_extra(extra)
    from reftune.serving.server import serve as run

    run(model, folders, settings)


with_flags(serve, typed_fields(ServerSettings))
