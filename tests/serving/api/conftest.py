"""A server without a model, in this process."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from reftune.serving.api.app import build_app
from reftune.serving.api.keys import Keys
from reftune.serving.api.service import Limits, Service
from reftune.serving.catalogue import Catalogue
from tests.serving.api.canary import CanaryEngine


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Folders that look like adapters; nothing reads them."""
    for name in ("pirate", "formal", "terse", "broken"):
        (tmp_path / "adapters" / name).mkdir(parents=True)
        (tmp_path / "adapters" / name / "adapter_config.json").write_text("{}", encoding="utf-8")
    return tmp_path / "adapters"


@pytest.fixture
def served(folder: Path) -> Iterator[Callable[..., Any]]:
    """`async with served(...) as client`: an HTTP client of a fresh server, with `client.engine` and `client.service`."""

    @asynccontextmanager
    async def run(keys: str = "", pause: float = 0.0, context: int = 512, **limits: Any) -> Any:
        engine: Any = CanaryEngine(pause, context)
        engine.broken.add("broken")
        service = Service(engine, Catalogue([folder]), "base", Limits(**limits), Keys(keys))
        transport = httpx.ASGITransport(build_app(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            client.engine, client.service = engine, service  # type: ignore[attr-defined]
            yield client

    yield run


@pytest.fixture
def ask(served: Callable[..., Any]) -> Callable[..., httpx.Response]:
    """One request to a fresh server."""

    def one(method: str, path: str, settings: dict[str, Any] | None = None, **request: Any) -> httpx.Response:
        async def run() -> httpx.Response:
            async with served(**(settings or {})) as client:
                return await client.request(method, path, **request)

        return asyncio.run(run())

    return one
