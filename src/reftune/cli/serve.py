"""`reftune serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from reftune.cli.common_options import Device, Dtype

_LISTEN, _LIMITS = "Listening", "Limits"


def serve(
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Base model: a name, a folder, or smollm2.")
    ] = "smollm2",
    adapters: Annotated[
        list[Path] | None,
        typer.Option("--adapters", "-a", metavar="DIR", help="Folder of adapters, or an adapter; may be given again."),
    ] = None,
    engine: Annotated[
        str, typer.Option(help="auto, embedded (this process; one machine) or vllm (an installed vLLM, at scale).")
    ] = "auto",
    base_name: Annotated[str | None, typer.Option(help="What requests call the base; default: its own name.")] = None,
    host: Annotated[
        str, typer.Option(help="Address; any but this machine's needs --api-keys.", rich_help_panel=_LISTEN)
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0: a free one.", rich_help_panel=_LISTEN)] = 8000,
    api_keys: Annotated[
        Path | None,
        typer.Option(
            help="File with a key a line ('KEY adapters=a,b* admin'); default: $REFTUNE_API_KEYS.",
            rich_help_panel=_LISTEN,
        ),
    ] = None,
    ui: Annotated[bool, typer.Option(help="A page to chat, compare and train on.", rich_help_panel=_LISTEN)] = True,
    max_model_len: Annotated[
        int | None,
        typer.Option(min=2, help="Most tokens of prompt and answer; default: the model's.", rich_help_panel=_LIMITS),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Most tokens of an answer.", rich_help_panel=_LIMITS)
    ] = 4096,
    max_requests: Annotated[
        int, typer.Option(min=1, help="Answers written or waiting at once; more get 429.", rich_help_panel=_LIMITS)
    ] = 256,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds for one request.", rich_help_panel=_LIMITS)] = 600.0,
    max_body: Annotated[int, typer.Option(min=1, help="KiB of a request's body.", rich_help_panel=_LIMITS)] = 2048,
    cache_tokens: Annotated[
        int, typer.Option(min=256, help="Tokens whose keys and values are kept.", rich_help_panel=_LIMITS)
    ] = 32_768,
    adapter_memory: Annotated[
        int,
        typer.Option(
            min=1, help="MiB of adapters kept ready; others are read when asked for.", rich_help_panel=_LIMITS
        ),
    ] = 1024,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Serve a base model and its adapters by OpenAI's API, with a page to try them.

    Options that are not known here go to `vllm serve` (--engine vllm).
    """
    from reftune.serving.choosing import choose_engine, refuse_extra

    folders = [str(folder) for folder in adapters or []]
    chosen, why = choose_engine(engine, model)
    if why:
        typer.echo(why, err=True)
    if chosen == "vllm":
        from reftune.serving.vllm.launch import launch

        extra = list(context.args)
        if max_model_len:
            extra += ["--max-model-len", str(max_model_len)]
        launch(model, folders, port, host, extra)
        return
    refuse_extra(context.args)
    from reftune.serving.api.service import Limits
    from reftune.serving.server import ServerSettings, serve

    limits = Limits(max_body * 1024, None, max_new_tokens, max_requests, timeout)
    serve(
        ServerSettings(
            model, folders, base_name, host, port, api_keys, ui, max_model_len, cache_tokens, adapter_memory * 2**20,
            dtype, device, limits=limits,
        )
    )  # fmt: skip
