"""The embedded server: a base model, its adapters, and the HTTP interface in one process."""

from __future__ import annotations

import json
import logging
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reftune.errors import ReftuneError
from reftune.serving.settings import LOCAL_HOSTS, ServerSettings

SECONDS_TO_END = 30
"""After SIGTERM: how long answers that have begun may still be written."""


def build(model: str, adapters: Sequence[str | Path], settings: ServerSettings) -> Any:
    """Load the base and make the ASGI application.

    Args:
        model: the base, as ``reftune.models.load`` takes it.
        adapters: folders that hold adapters, or are adapters.
        settings: the rest.

    Raises:
        ReftuneError: a missing package, folder, model or key.
    """
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ReftuneError(f"serving needs {error.name}: run `pip install 'reftune[serve]'`.") from None
    from reftune import models
    from reftune.serving.api.app import build_app
    from reftune.serving.api.keys import read_keys
    from reftune.serving.api.service import Limits, Service
    from reftune.serving.bank import Bank
    from reftune.serving.catalogue import Catalogue
    from reftune.serving.engine import EmbeddedEngine
    from reftune.serving.page.routes import page_routes

    keys = read_keys(settings.api_keys)
    local = settings.host in LOCAL_HOSTS
    if not local and not keys:
        raise ReftuneError(
            f"host={settings.host!r}: others could reach this server without a key; give --api-keys FILE, or set "
            "REFTUNE_API_KEYS, or keep --host 127.0.0.1."
        )
    catalogue = Catalogue(adapters)
    name = settings.base_name or Path(model).name
    if catalogue.folder(name) is not None:
        raise ReftuneError(f"an adapter is called {name!r} as the base model is: give the base another --base-name.")
    base, tokenizer = models.load(model, settings.dtype, settings.device)
    engine = EmbeddedEngine(
        base,
        tokenizer,
        Bank(settings.adapter_memory * 2**20),
        cache_tokens=settings.cache_tokens,
        batch_tokens=settings.batch_tokens,
        context=settings.max_model_len,
    )
    limits = Limits(
        settings.max_body * 1024,
        settings.max_prompt_tokens,
        settings.max_new_tokens,
        settings.max_requests,
        settings.timeout,
    )
    service = Service(engine, catalogue, name, limits, keys)
    routes, closing = page_routes(service, model, settings.device) if settings.ui else (None, None)
    return build_app(service, local, routes, closing)


def serve(model: str, adapters: Sequence[str | Path], settings: ServerSettings) -> None:
    """Serve until SIGTERM or Ctrl-C; answers that have begun are ended first.

    Raises:
        ReftuneError: as ``build``; an address that cannot be had.
    """
    listening = _listen(settings.host, settings.port)
    try:
        app = build(model, adapters, settings)
        import uvicorn

        log = logging.getLogger("reftune.serve")
        if not log.handlers:
            lines = logging.StreamHandler(sys.stderr)
            lines.setFormatter(logging.Formatter("%(message)s"))
            log.addHandler(lines)
            log.setLevel(logging.INFO)
            log.propagate = False
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        log.info(json.dumps({"event": "ready", "address": f"http://{host}:{listening.getsockname()[1]}"}))
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=SECONDS_TO_END
        )
        uvicorn.Server(config).run(sockets=[listening])
    except KeyboardInterrupt:  # the signal that ended it, raised again when everything has ended in order
        pass
    finally:
        listening.close()


def _listen(host: str, port: int) -> socket.socket:
    """A socket that is taken before a model is loaded, so that a taken port is told at once."""
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        reason = error.strerror or str(error)
        raise ReftuneError(f"cannot listen on {host}, port {port} ({reason}): give another --port or --host.") from None
    return listening
