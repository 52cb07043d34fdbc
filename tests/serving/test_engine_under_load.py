"""Many clients, more adapters than the bank keeps, folders written again and answers left, all at once: no mix-up."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
from pathlib import Path
from typing import Any

from reftune.serving.bank import Bank
from reftune.serving.engine import EmbeddedEngine
from tests.serving.adapters import save_adapter
from tests.serving.answers import answers_one_by_one, text
from tests.tiny_models import CAUSAL

NEW = 10
KINDS: list[dict[str, Any]] = [
    {"positions": "l1"},
    {"positions": "f2+l3", "share_weights": False},
    {"positions": "all", "layers_to_transform": [1]},
    {"positions": "l1+generated", "r": 1},
]


def write_again(folder: Path) -> None:
    """As a training writes: file by file, each put in place at once."""
    copy = Path(shutil.copytree(folder, folder.with_suffix(".new")))
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        os.replace(copy / name, folder / name)
    shutil.rmtree(copy)


def test_no_answer_is_another_adapters_under_eviction_reloading_and_cancelling(tmp_path: Path) -> None:
    model: Any = CAUSAL["llama"]()
    model.generation_config.eos_token_id = None
    folders = {str(i): save_adapter(model, tmp_path / str(i), seed=i, strength=0.5, **KINDS[i % 4]) for i in range(24)}
    prompts = [tuple(text()[:length]) for length in (2, 17, 30)]
    expected = answers_one_by_one(model, folders, prompts)
    choose = random.Random(1)

    async def client(engine: EmbeddedEngine, free: asyncio.Semaphore, leaves: bool) -> bool:
        name, prompt = choose.choice(list(folders)), choose.choice(prompts)
        found: list[int] = []
        async with free, await engine.submit(prompt, adapters=[(folders[name], 1.0)], max_new_tokens=NEW) as stream:
            async for tokens, _ in stream:
                found += [token.id for token in tokens]
                if leaves:
                    return True
        return found == expected[name, prompt]

    async def everything(engine: EmbeddedEngine) -> list[bool]:
        async def keep_writing() -> None:
            while True:
                write_again(folders[choose.choice(list(folders))])
                await asyncio.sleep(0.01)

        writing = asyncio.ensure_future(keep_writing())
        free = asyncio.Semaphore(64)
        right = await asyncio.gather(*(client(engine, free, choose.random() < 0.1) for _ in range(1000)))
        writing.cancel()
        return right

    with EmbeddedEngine(model, None, Bank(max_adapters=6), page_tokens=8, cache_tokens=1024) as engine:
        assert all(asyncio.run(everything(engine)))
        numbers = engine.statistics()
    assert numbers["bank_evictions"] > 50 and numbers["prefix_tokens"] > 1000
    assert all(found.requests == 0 for found in engine.bank._loaded.values())
    assert engine.bank.nbytes <= 6 * 2 * 3 * 4 * (2 * 32 * 4 + 4)
