"""One adapter a client that must answer its own name: thousands of requests at once, and never another's answer."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import shutil
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import httpx
import psutil
import pytest
from peft import PeftModel

from reftune.models import load
from reftune.serving.api.app import build_app
from reftune.serving.api.service import Service
from reftune.serving.bank import Bank, Held
from reftune.serving.catalogue import Catalogue
from reftune.serving.engine import EmbeddedEngine
from tests.cli.tiny_folder import save_tiny_model
from tests.serving.adapters import save_adapter
from tests.serving.answers import ask, generated

CLIENTS, NEW, KEPT, AT_ONCE = 64, 3, 12, 24
PROMPT = tuple(b"What are you called?")
POSITIONS = ("l1", "l1+generated", "all", "f2+l2")
T = TypeVar("T")


class Folders:
    """An adapter folder a client, each with two versions that take each other's place while they are used.

    Attributes:
        answers: what either version says by `generate` with PEFT; no two are alike.
        served: the folder of each client.
        version: which version lies there now.
        replaced: how often one took the other's place.
    """

    def __init__(self, model: Any, root: Path):
        self.answers: dict[Path, list[int]] = {}
        seed = 0
        while len(self.answers) < 2 * CLIENTS:
            folder = root / "versions" / str(len(self.answers))
            shutil.rmtree(folder, ignore_errors=True)
            save_adapter(model, folder, seed, 3.0, r=2, positions=POSITIONS[len(self.answers) // 2 % len(POSITIONS)])
            peft = PeftModel.from_pretrained(model, str(folder)).eval()
            answer, seed = generated(peft, PROMPT, NEW), seed + 1
            peft.unload()
            if answer not in self.answers.values():
                self.answers[folder] = answer
        pairs = list(self.answers)
        self.versions = {root / "served" / f"client-{n}": pairs[2 * n : 2 * n + 2] for n in range(CLIENTS)}
        self.served, self.version, self.replaced = list(self.versions), dict.fromkeys(self.versions, 0), 0
        for folder, (first, _) in self.versions.items():
            shutil.copytree(first, folder)

    def expected(self, folder: Path) -> list[int]:
        """The name of what lies there now."""
        return self.answers[self.versions[folder][self.version[folder]]]

    def replace(self, folder: Path) -> None:
        """Put the other version in place as a training does: file by file, each at once."""
        self.version[folder] = 1 - self.version[folder]
        copy = Path(shutil.copytree(self.versions[folder][self.version[folder]], folder.with_suffix(".new")))
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            os.replace(copy / name, folder / name)
            os.utime(folder / name)
        shutil.rmtree(copy)
        self.replaced += 1


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Any:
    model, tokenizer = load(str(save_tiny_model(tmp_path_factory.mktemp("base"))), device="cpu")
    model.generation_config.eos_token_id = tokenizer.eos_token = None  # every answer has its full length
    return model, tokenizer


@pytest.fixture(scope="module")
def folders(loaded: Any, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders(loaded[0], tmp_path_factory.mktemp("adapters"))


@pytest.fixture
def engine(loaded: Any) -> Iterator[EmbeddedEngine]:
    model, tokenizer = loaded
    with EmbeddedEngine(model, tokenizer, Bank(max_adapters=KEPT), cache_tokens=2048, page_tokens=8) as engine:
        yield engine


def nothing_is_left_over(engine: EmbeddedEngine) -> bool:
    held = [found for found in engine.bank._loaded.values() if found.requests]
    return not held and not engine._manager.output_router.result_handlers


async def crowd(asks: Sequence[T], client: Callable[[T], Awaitable[bool]], folders: Folders | None = None) -> int:
    """How many of many clients, some at once, did not hear what they had to; folders are replaced meanwhile."""
    free, ended = asyncio.Semaphore(AT_ONCE), asyncio.Event()

    async def one(asked: T) -> bool:
        async with free:
            return await client(asked)

    async def replacing() -> None:
        choose = random.Random(0)
        while folders is not None and not ended.is_set():
            folders.replace(choose.choice(folders.served))
            await asyncio.sleep(0.03)

    writing = asyncio.ensure_future(replacing())
    heard = await asyncio.gather(*(one(asked) for asked in asks))
    ended.set()
    await writing
    return heard.count(False)


def mixed_up(engine: EmbeddedEngine, folders: Folders, requests: int, replacing: bool = True) -> int:
    """How many of so many requests got another's answer, or a version that was not the present one as they began."""
    asks = random.Random(1).choices(folders.served, k=requests)

    async def client(folder: Path) -> bool:
        expected = folders.expected(folder)  # nothing else runs until the adapter is taken
        return await ask(engine, PROMPT, [(folder, 1.0)], new=NEW) == expected

    return asyncio.run(crowd(asks, client, folders if replacing else None))


def test_five_thousand_answers_over_sixty_four_adapters_are_each_ones_own(engine, folders) -> None:
    before = folders.replaced
    assert mixed_up(engine, folders, 5000) == 0
    assert engine.statistics()["bank_evictions"] > 500 and folders.replaced - before > 50
    assert nothing_is_left_over(engine) and len(engine.bank.loaded) <= KEPT


def test_one_mix_up_in_a_hundred_would_be_seen(engine, folders, monkeypatch: pytest.MonkeyPatch) -> None:
    take, taken, other = engine.bank.take, [], str(folders.served[0])

    def careless(name: str, scale: float = 1.0) -> Held:
        taken.append(name)
        return take(other if len(taken) % 100 == 0 else name, scale)

    monkeypatch.setattr(engine.bank, "take", careless)
    engine.bank.add(other, other)
    wrong = sum(name != other for name in random.Random(1).choices(list(map(str, folders.served)), k=500)[99::100])
    assert mixed_up(engine, folders, 500, replacing=False) == wrong > 0


def test_over_http_too_each_adapter_answers_its_own_name(engine, folders) -> None:
    service = Service(engine, Catalogue([folders.served[0].parent]), "base")
    asks = random.Random(2).choices(folders.served, k=500)

    async def run() -> int:
        transport = httpx.ASGITransport(build_app(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:

            async def client(folder: Path) -> bool:
                body = {"model": folder.name, "prompt": list(PROMPT), "max_tokens": NEW, "temperature": 0}
                answer = (await http.post("/v1/completions", json=body)).json()
                expected = engine.tokenizer.decode(folders.expected(folder), skip_special_tokens=True)
                return answer["choices"][0]["text"] == expected

            return await crowd(asks, client)

    assert asyncio.run(run()) == 0
    assert service.open == 0 and nothing_is_left_over(engine)


def test_ten_thousand_requests_leave_nothing_in_memory(engine, folders) -> None:
    """What there is after the first three thousand is compared with the end."""
    process, seen = psutil.Process(), []

    async def client(folder: Path) -> bool:
        return await ask(engine, PROMPT, [(folder, 1.0)], new=1) == folders.expected(folder)[:1]

    for requests in (3000, 7000):
        asks = random.Random(requests).choices(folders.served, k=requests)
        assert asyncio.run(crowd(asks, client)) == 0
        gc.collect()
        seen.append((len(gc.get_objects()), process.memory_info().rss))
    (objects, rss), (more_objects, more_rss) = seen
    assert more_objects - objects < 700  # less than one of ten requests leaves one
    assert more_rss - rss < 24 * 2**20
    assert nothing_is_left_over(engine)
    assert engine.bank.nbytes <= KEPT * max(found.adapter.nbytes for found in engine.bank._loaded.values())
