"""API server: `model=<name of a folder>` finds its adapter at first use, and `/v1/models` lists all there are."""
# pyright: reportMissingImports=false, reportUntypedBaseClass=false

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from reftune.adapter.checkpoint import CONFIG_FILE, WEIGHTS_FILE
from reftune.adapter.expression import parse_expression
from reftune.errors import ReftuneError
from reftune.serving.catalogue import Catalogue
from reftune.serving.folded import read_folded
from reftune.serving.vllm.requested import Requested, is_reft, scaled_path, served_folders, split_scale
from reftune.users.store import user_of


def served_path(catalogue: Catalogue, model: str) -> str | None:
    """What vLLM is told to load for a `model` of a request: a name, or a name with a strength as in `0.5*poet`.

    Returns:
        The adapter's folder, with its strength; None where there is no such adapter.
    """
    if (whole := catalogue.folder(model)) is not None:
        return str(whole)
    try:
        terms = parse_expression(model)
    except ReftuneError:
        return None
    if len(terms) != 1 or (folder := catalogue.folder(terms[0][0])) is None:
        return None
    return scaled_path(str(folder), terms[0][1])


def signature(path: str) -> tuple[int, ...]:
    """Of an adapter's files, or of a user of a store, so that a change is seen; empty where one is missing."""
    folder = Path(split_scale(path)[0])
    try:
        if (user := user_of(folder)) is not None:
            return (int(user[0].digest(user[1]), 16),)
        stats = [(folder / name).stat() for name in (CONFIG_FILE, WEIGHTS_FILE)]
    except (OSError, ReftuneError):
        return ()
    return tuple(number for stat in stats for number in (stat.st_mtime_ns, stat.st_size, stat.st_ino))


class CurrentAdapters(dict[str, Any]):
    """vLLM's table of loaded adapters by name, that forgets an adapter whose folder has changed.

    The name is then resolved again, under a new id; requests in flight keep the id, and the weights, they began with. A
    folder that is half written is not taken yet.
    """

    def __init__(self, entries: dict[str, Any]):
        super().__init__()
        self._signatures: dict[str, tuple[int, ...] | None] = {}
        for name, request in entries.items():
            self[name] = request

    def __setitem__(self, name: str, request: Any) -> None:
        super().__setitem__(name, request)
        self._signatures[name] = signature(request.lora_path) if is_reft(request.lora_path) else None

    def __contains__(self, name: object) -> bool:
        if not super().__contains__(name):
            return False
        request = self[str(name)]
        known, now = self._signatures[str(name)], signature(request.lora_path)
        if known is None or now == known:
            return True
        try:
            read_folded(split_scale(request.lora_path)[0])
        except ReftuneError:
            return bool(now)
        del self[str(name)]
        return False

    def values(self) -> Any:
        """Of the adapters that are still as they were loaded: what `/v1/models` lists."""
        return [self[name] for name in list(self) if name in self]


def add_resolver() -> None:
    """Let this process find adapters by the names of their folders."""
    from vllm.lora.request import LoRARequest
    from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

    catalogue = Catalogue(served_folders())

    class FolderNames(LoRAResolver):
        requested: Requested | None = None

        async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
            path = served_path(catalogue, lora_name)
            if path is not None and self.requested is not None:
                self.requested.read(path)  # its refusal is the client's answer; one in the engine would be logged only
            return None if path is None else LoRARequest(lora_name, 1, path)  # vLLM gives it an id of its own

    LoRAResolverRegistry.register_resolver("reftune", FolderNames())


class ModelList:
    """Entry point `vllm.endpoint_plugins`: `/v1/models` with every adapter of the served folders, loaded or not."""

    name = "reftune"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self.catalogue = Catalogue(served_folders())

    def attach_router(self, app: Any) -> None:
        """Answer `GET /v1/models` in vLLM's place; **changes the app**."""
        from fastapi.responses import JSONResponse
        from starlette.requests import Request
        from vllm.entrypoints.serve.engine.protocol import ModelCard, ModelPermission

        async def models(raw_request: Request) -> JSONResponse:
            served = raw_request.app.state.openai_serving_models
            listed = await served.show_available_models()
            loaded = {card.id for card in listed.data}
            for name in self.catalogue.names():
                folder = self.catalogue.folder(name)
                if name not in loaded and folder is not None:
                    base = served.base_model_paths[0].name
                    listed.data.append(
                        ModelCard(id=name, root=str(folder), parent=base, permission=[ModelPermission()])
                    )
            return JSONResponse(content=listed.model_dump())

        models.__annotations__ = {"raw_request": Request, "return": JSONResponse}
        app.add_api_route("/v1/models", models, methods=["GET"])

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Let changed folders be taken up, say why one is refused, and end in order; **changes state and client**."""
        from vllm.entrypoints.serve import create_error_response
        from vllm.lora.resolver import LoRAResolverRegistry

        served, requested = state.openai_serving_models, Requested.of(engine_client.vllm_config)
        served.lora_requests = CurrentAdapters(served.lora_requests)
        if "reftune" in LoRAResolverRegistry.get_supported_resolvers():
            LoRAResolverRegistry.get_resolver("reftune").requested = requested
        stock = served.load_lora_adapter

        async def load_lora_adapter(request: Any, *rest: Any, **options: Any) -> Any:
            try:
                requested.read(request.lora_path)
            except ReftuneError as error:
                return create_error_response(str(error))
            return await stock(request, *rest, **options)

        served.load_lora_adapter = load_lora_adapter
        _end_streams_with(engine_client)


def _end_streams_with(engine_client: Any) -> None:
    """Once the engine has ended, so do the answers that it left: vLLM's server would wait for their ends for ever."""
    loop, stock, processor = asyncio.get_running_loop(), engine_client.shutdown, engine_client.output_processor

    def shutdown(timeout: float | None = None) -> None:
        stock(timeout=timeout)
        loop.call_soon_threadsafe(lambda: processor.abort_requests(list(processor.request_states), internal=True))

    engine_client.shutdown = shutdown
