"""The embedded server: a base model, its adapters, and the HTTP interface in one process."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reftune.errors import ReftuneError

if TYPE_CHECKING:
    from reftune.serving.api.service import Limits

LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class ServerSettings:
    """What is served, where, and to whom.

    Attributes:
        model: the base, as `reftune.models.load` takes it.
        adapters: folders that hold adapters, or are adapters.
        base_name: what the base is called in `model`; by default its own name.
        host: address to listen on.
        port: port to listen on; 0 takes a free one.
        api_keys: file of keys; None reads `REFTUNE_API_KEYS`.
        page: whether `/` is a page to chat and train on.
        context: most tokens of prompt and answer together; by default the model's.
        cache_tokens: keys and values kept, in tokens, over all requests.
        adapter_bytes: folded adapters kept in memory.
        dtype: of the base.
        device: of the base.
        quantization: of the base, "4bit" or "8bit".
    """

    model: str = "smollm2"
    adapters: Sequence[str | Path] = ()
    base_name: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: str | Path | None = None
    page: bool = True
    context: int | None = None
    cache_tokens: int = 32_768
    adapter_bytes: int = 2**30
    dtype: str | None = None
    device: str | None = None
    quantization: Any = None
    limits: Limits | None = field(default=None)


def build(settings: ServerSettings) -> Any:
    """Load the base and make the ASGI application.

    Raises:
        ReftuneError: a missing package, folder, model or key.
    """
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ReftuneError(f"serving needs {error.name}: run `pip install 'reftune[serve]'`.") from None
    from reftune.serving.bank import Bank
    from reftune.serving.engine import EmbeddedEngine

    from reftune import models
    from reftune.serving.api.app import build_app
    from reftune.serving.api.keys import read_keys
    from reftune.serving.api.service import Service
    from reftune.serving.catalogue import Catalogue

    keys = read_keys(settings.api_keys)
    local = settings.host in LOCAL_HOSTS
    if not local and not keys:
        raise ReftuneError(
            f"--host {settings.host}: others could reach this server without a key; give --api-keys FILE, or set "
            "REFTUNE_API_KEYS, or keep --host 127.0.0.1."
        )
    catalogue = Catalogue(settings.adapters)
    base, tokenizer = models.load(settings.model, settings.dtype, settings.device, quantization=settings.quantization)
    name = settings.base_name or Path(settings.model).name
    if catalogue.folder(name) is not None:
        raise ReftuneError(f"an adapter is called {name!r} as the base model is: give the base another --base-name.")
    engine = EmbeddedEngine(
        base, tokenizer, Bank(base, budget_bytes=settings.adapter_bytes), context=settings.context,
        cache_tokens=settings.cache_tokens,
    )  # fmt: skip
    service = Service(engine, catalogue, name, settings.limits, keys)
    return build_app(service, local_only=local)


def serve(settings: ServerSettings) -> None:
    """Serve until SIGTERM or Ctrl-C; answers that have begun are ended first.

    Raises:
        ReftuneError: as `build`; an address that is taken.
    """
    import socket

    app = build(settings)
    import uvicorn

    log = logging.getLogger("reftune.serve")
    if not log.handlers:
        lines = logging.StreamHandler(sys.stderr)
        lines.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(lines)
        log.setLevel(logging.INFO)
        log.propagate = False
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((settings.host, settings.port))
    except (OSError, OverflowError) as error:
        listening.close()
        raise ReftuneError(
            f"cannot listen on {settings.host}:{settings.port} ({error}); give another --port."
        ) from None
    port = listening.getsockname()[1]
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    log.info('{"event": "ready", "address": "http://%s:%d"}', host, port)
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=30,
        server_header=False,
        h11_max_incomplete_event_size=65536,
    )
    uvicorn.Server(config).run(sockets=[listening])
