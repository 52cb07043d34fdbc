"""Prompts that share beginnings, adapters of every kind of position, and what `generate` answers one by one."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from reftune.serving.engine import EmbeddedEngine
from reftune.serving.requests import Sampling
from tests.serving.adapters import save_adapter

NEW = 10
CONFIGS: dict[str, dict[str, Any]] = {
    "last": {"layers_to_transform": [1]},
    "last at all layers": {},
    "ends": {"positions": "f2+l3", "share_weights": False, "layers_to_transform": [0, 2]},
    "long ends": {"positions": "f7+l7", "r": 8},
    "prompt": {"positions": "prompt", "layers_to_transform": [1]},
    "all": {"positions": "all", "layers_to_transform": [0, 1]},
    "answer": {"positions": "l1+generated", "component": "mlp_output"},
    "bent": {"act_fn": "tanh", "positions": "l2"},
    "gated": {"method": "gated", "positions": "l1+generated"},
}
Job = tuple[str | None, tuple[int, ...]]


def text(length: int = 48) -> list[int]:
    return torch.randint(3, 96, (length,), generator=torch.Generator().manual_seed(0)).tolist()


PROMPTS = [tuple(text()[:length]) for length in (1, 2, 5, 14, 21, 33, 40)]


def save_all(model: Any, root: Path, configs: dict[str, dict[str, Any]] | None = None) -> dict[str, Path]:
    """A folder for each configuration, with edits so strong that they change most answers."""
    found = (configs or CONFIGS).items()
    return {name: save_adapter(model, root / name, seed=i, strength=0.5, **c) for i, (name, c) in enumerate(found)}


def generated(model: Any, prompt: Sequence[int], new: int = NEW) -> list[int]:
    ids = torch.tensor([list(prompt)])
    mask = torch.ones_like(ids)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0)
    return out[0, len(prompt) :].tolist()


def answers_one_by_one(
    model: Any, folders: dict[str, Path], prompts: Sequence[tuple[int, ...]]
) -> dict[Job, list[int]]:
    """What each adapter, loaded by PEFT, and the base model answer to each prompt."""
    expected: dict[Job, list[int]] = {(None, prompt): generated(model, prompt) for prompt in prompts}
    for name, folder in folders.items():
        peft = PeftModel.from_pretrained(model, str(folder)).eval()
        expected |= {(name, prompt): generated(peft, prompt) for prompt in prompts}
        peft.unload()
    return expected


async def ask(
    engine: EmbeddedEngine,
    prompt: Sequence[int],
    adapters: Sequence[tuple[Path, float]] = (),
    sampling: Sampling | None = None,
    new: int = NEW,
) -> list[int]:
    """An answer's token ids."""
    found: list[int] = []
    async with await engine.submit(prompt, adapters=adapters, max_new_tokens=new, sampling=sampling) as stream:
        async for tokens, _ in stream:
            found += [token.id for token in tokens]
    return found


def ask_all(engine: EmbeddedEngine, folders: dict[str, Path], jobs: Sequence[Job]) -> dict[Job, list[int]]:
    """All at once, in a shuffled order."""
    order = list(jobs)
    random.Random(0).shuffle(order)

    async def everything() -> list[list[int]]:
        asked = [ask(engine, prompt, [(folders[name], 1.0)] if name else []) for name, prompt in order]
        return await asyncio.gather(*asked)

    return dict(zip(order, asyncio.run(everything()), strict=True))
