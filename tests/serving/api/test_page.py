"""The page's own routes: files, training from a table, pictures of an adapter. tests/serving/test_page.py clicks."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from reftune.serving.api.app import build_app
from reftune.serving.api.keys import Keys
from reftune.serving.api.service import Service
from reftune.serving.catalogue import Catalogue
from reftune.serving.page.routes import page_routes
from tests.cli.tiny_folder import save_tiny_model
from tests.serving.api.canary import CanaryEngine

TABLE = "prompt,completion\n" + "".join(f"say {index},ye be {index}\n" for index in range(4))


@pytest.fixture
def visit(tmp_path: Path) -> Callable[..., Any]:
    model = save_tiny_model(tmp_path / "model")
    (tmp_path / "adapters").mkdir()

    def run(steps: Callable[[httpx.AsyncClient], Any], keys: str = "") -> Any:
        async def go() -> Any:
            engine: Any = CanaryEngine()
            service = Service(engine, Catalogue([tmp_path / "adapters"]), "base", None, Keys(keys))
            router, close = page_routes(service, str(model), "cpu")
            transport = httpx.ASGITransport(build_app(service, more=router))
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=120) as client:
                found = await steps(client)
            await close()
            return found

        return asyncio.run(go())

    return run


def events(text: str) -> list[Any]:
    return [json.loads(line.removeprefix("data: ")) for line in text.split("\n\n") if line and "[DONE]" not in line]


def test_the_page_loads_nothing_from_elsewhere(visit: Any) -> None:
    async def steps(client: httpx.AsyncClient) -> list[httpx.Response]:
        return [await client.get(path) for path in ("/", "/ui/page.css", "/ui/page.js")]

    for answer in visit(steps, keys="a-key-of-mine"):  # the files tell nothing, and ask for no key
        assert answer.status_code == 200 and "default-src 'self'" in answer.headers["content-security-policy"]
        assert "http://" not in answer.text.replace("http://www.w3.org/2000/svg", "") and "https://" not in answer.text


def test_an_adapter_is_trained_from_a_table_and_offered(visit: Any, tmp_path: Path) -> None:
    async def steps(client: httpx.AsyncClient) -> None:
        answer = await client.post("/ui/train", json={"name": "mate", "table": TABLE, "epochs": 2})
        assert answer.status_code == 200, answer.text
        busy = await client.post("/ui/train", json={"name": "other", "table": TABLE})
        assert busy.status_code == 400 and "going on" in busy.text
        news = events((await client.get("/ui/train/mate")).text)
        assert news[-1]["state"] == "done", news[-1]
        assert news[-1]["losses"][-1][:2] == [2, 2]
        assert (await client.get("/v1/models/mate")).status_code == 200
        again = await client.post("/ui/train", json={"name": "mate", "table": TABLE})
        assert again.status_code == 400 and "already" in again.text
        picture = await client.get("/ui/adapters/mate/picture.png")
        assert picture.content.startswith(b"\x89PNG")
        found = (await client.get("/ui/adapters/mate/explanation")).json()
        assert len(found["removal"]) == 2 and found["effect"] >= 0 and "intervention" not in found["text"]
        assert (await client.get("/ui/adapters/base/picture.png")).status_code == 404
        assert (await client.get("/ui/adapters/..%2f..%2fmodel/picture.png")).status_code == 404

    visit(steps)
    assert sorted(path.name for path in (tmp_path / "adapters").iterdir()) == [".rows", "mate"]


def test_a_table_that_cannot_be_read_is_told_and_leaves_nothing(visit: Any, tmp_path: Path) -> None:
    async def steps(client: httpx.AsyncClient) -> Any:
        assert (await client.post("/ui/train", json={"name": "bad", "table": "a,b\n1,2\n"})).status_code == 200
        return events((await client.get("/ui/train/bad")).text)[-1]

    last = visit(steps)
    assert last["state"] == "failed" and "Error" in last["error"]
    assert [path.name for path in (tmp_path / "adapters").iterdir()] == [".rows"]


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "x" * 200, "a\\b"])
def test_a_name_that_is_a_path_trains_nothing(visit: Any, name: str, tmp_path: Path) -> None:
    async def steps(client: httpx.AsyncClient) -> int:
        return (await client.post("/ui/train", json={"name": name, "table": TABLE})).status_code

    assert visit(steps) == 400
    assert list((tmp_path / "adapters").iterdir()) == []


def test_a_run_is_stopped(visit: Any, tmp_path: Path) -> None:
    async def steps(client: httpx.AsyncClient) -> Any:
        await client.post("/ui/train", json={"name": "long", "table": TABLE, "epochs": 900})
        await client.post("/ui/train/stop", json={})
        return events((await client.get("/ui/train/long")).text)[-1]["state"]

    assert visit(steps) == "stopped"
    assert [path.name for path in (tmp_path / "adapters").iterdir()] == [".rows"]


def test_training_asks_for_an_admin_key_where_there_are_keys(visit: Any) -> None:
    async def steps(client: httpx.AsyncClient) -> list[int]:
        body = {"name": "mate", "table": TABLE}
        headers = {"authorization": "Bearer plain-key-1"}
        return [
            (await client.post("/ui/train", json=body)).status_code,
            (await client.post("/ui/train", json=body, headers=headers)).status_code,
            (await client.post("/ui/train/stop", json={}, headers=headers)).status_code,
        ]

    assert visit(steps, keys="plain-key-1\n") == [401, 403, 403]
