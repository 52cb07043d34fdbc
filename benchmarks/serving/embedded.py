"""The embedded engine's cost by adapters and positions: CPU seconds beside the base model and PEFT's LoRA, in pairs.

Usage: python -m benchmarks.serving.embedded [--rounds N] [--requests N] [--tokens N] [--peer-adapters N]

Every round runs each case and, right before or after it, the base model in the same engine, so that a busy machine
slows both. CPU seconds are those of the process, over all threads.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import logging
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console

import reftune
from reftune.models import load
from reftune.serving.bank import Bank
from reftune.serving.catalogue import Catalogue
from reftune.serving.engine import EmbeddedEngine

COUNTS = (1, 8, 64, 512)
KINDS: dict[str, dict[str, Any]] = {
    "l1, layer 8, r 4": {"positions": "l1", "layers_to_transform": [8], "r": 4},
    "prompt, layer 8, r 4": {"positions": "prompt", "layers_to_transform": [8], "r": 4},
    "l1+generated, all layers, r 1": {"positions": "l1+generated", "r": 1},
    "all, layer 8, r 4": {"positions": "all", "layers_to_transform": [8], "r": 4},
}
MANY = 10_000


def cpu(run: Callable[[], Any]) -> float:
    """CPU seconds of a call."""
    begin = time.process_time()
    run()
    return time.process_time() - begin


def save_many(model: Any, root: Path, config: dict[str, Any], count: int) -> list[Path]:
    """So many folders with random weights of their own."""
    from safetensors.torch import load_file, save_file

    peft = get_peft_model(model, reftune.ReftConfig(init="paper", task_type="CAUSAL_LM", **config))
    peft.save_pretrained(str(root / "0"))
    peft.unload()
    weights = load_file(root / "0" / "adapter_model.safetensors")
    for number in range(1, count):
        folder = root / str(number)
        folder.mkdir()
        shutil.copy(root / "0" / "adapter_config.json", folder)
        moved = {name: w if "rotat" in name else w + 0.01 * torch.randn_like(w) for name, w in weights.items()}
        save_file(moved, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return [root / str(number) for number in range(count)]


class Asking:
    """The same requests for different adapters, with different prompts of one length."""

    def __init__(self, engine: EmbeddedEngine, prompts: list[list[int]], tokens: int):
        self.engine, self.prompts, self.tokens = engine, prompts, tokens
        self.first: list[float] = []

    def __call__(self, folders: list[Path]) -> None:
        """Ask for all at once, adapters from all over the list; without adapters, for the base."""

        async def one(number: int) -> None:
            adapters = (
                [(folders[number * max(1, len(folders) // len(self.prompts)) % len(folders)], 1.0)] if folders else []
            )
            begin, waiting = time.perf_counter(), True
            request = self.engine.submit(self.prompts[number], adapters=adapters, max_new_tokens=self.tokens)
            async with await request as stream:
                async for _ in stream:
                    if waiting:
                        self.first.append(time.perf_counter() - begin)
                        waiting = False

        async def everything() -> None:
            await asyncio.gather(*(one(number) for number in range(len(self.prompts))))

        self.first.clear()
        asyncio.run(everything())


def edited_beside_base(asking: Asking, folders: list[Path], rounds: int) -> dict[str, float]:
    """Medians over rounds; the order within a round alternates. All adapters are in the bank."""
    for folder in folders:
        asking.engine.check(folder)
    ratios, speeds, first = [], [], []
    for number in range(rounds):
        if number % 2:
            edited, waits = cpu(lambda: asking(folders)), list(asking.first)
            base = cpu(lambda: asking([]))
        else:
            base = cpu(lambda: asking([]))
            edited, waits = cpu(lambda: asking(folders)), list(asking.first)
        ratios.append(base / edited)
        speeds.append(len(asking.prompts) * asking.tokens / edited)
        first.append(median(waits))
    return {"of base": median(ratios), "tokens a CPU second": median(speeds), "first token, s": median(first)}


def lora_beside_base(model: Any, prompts: list[list[int]], tokens: int, count: int, rounds: int) -> dict[str, float]:
    """PEFT's mixed batch (`adapter_names` in `generate`) of rank 8 on q and v, beside `generate` of the base."""
    peft: Any = get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"), "0")
    for number in range(1, count):
        peft.add_adapter(str(number), peft.peft_config["0"])
    peft.eval()
    ids = torch.tensor(prompts)
    given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": tokens, "min_new_tokens": tokens}
    names = [str(number % count) for number in range(len(prompts))]
    ratios, speeds = [], []
    for _ in range(rounds):
        edited = cpu(lambda: peft.generate(input_ids=ids, adapter_names=names, do_sample=False, **given))
        with peft.disable_adapter():
            base = cpu(lambda: peft.generate(input_ids=ids, do_sample=False, **given))
        ratios.append(base / edited)
        speeds.append(len(prompts) * tokens / edited)
    peft.unload()
    return {"of base": median(ratios), "tokens a CPU second": median(speeds)}


def load_times(folders: list[Path], check: Callable[[Any], None] | None = None) -> dict[str, float]:
    """Reading folders into a bank that is large enough."""
    bank = Bank(check=check)
    for folder in folders:
        bank.add(str(folder), folder)
    seconds = cpu(lambda: [bank.give_back(bank.take(str(folder))) for folder in folders])
    return {"ms an adapter": 1000 * seconds / len(folders), "bytes an adapter": bank.nbytes / len(folders)}


def registered(root: Path) -> dict[str, float]:
    """Start and memory with very many folders: found, then all of them read."""
    gc.collect()
    process = psutil.Process()
    before = process.memory_info().rss
    begin = time.perf_counter()
    catalogue = Catalogue([root])
    names = catalogue.names()
    start, listed = time.perf_counter() - begin, process.memory_info().rss - before
    bank = Bank()
    for name in names:
        folder = catalogue.folder(name)
        assert folder is not None
        bank.add(name, folder)
    seconds = cpu(lambda: [bank.give_back(bank.take(name)) for name in names])
    gc.collect()
    return {
        "adapters": len(names), "start, s": start, "listed, MB": listed / 1e6, "read all, CPU s": seconds,
        "all read, MB": (process.memory_info().rss - before) / 1e6,
    }  # fmt: skip


def main() -> None:
    """Print each case as it is measured, one JSON object a line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=48)
    parser.add_argument("--peer-adapters", type=int, default=8)
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS)
    parser.add_argument("--skip-many", action="store_true")
    options = parser.parse_args()
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
    console = Console(width=200)

    def say(case: str, found: dict[str, float]) -> None:
        console.print(json.dumps({"case": case} | {name: round(value, 3) for name, value in found.items()}))

    model, tokenizer = load("smollm2")
    model.generation_config.eos_token_id = tokenizer.eos_token = None  # every answer has its full length
    chosen = torch.Generator().manual_seed(0)
    prompts = torch.randint(100, 40_000, (options.requests, options.prompt), generator=chosen).tolist()
    with tempfile.TemporaryDirectory() as temporary:
        roots = {kind: Path(temporary) / str(index) for index, kind in enumerate(KINDS)}
        folders = {kind: save_many(model, roots[kind], KINDS[kind], max(options.counts)) for kind in KINDS}
        for kind in KINDS:
            say(f"load: {kind}", load_times(folders[kind][:64]))
        with EmbeddedEngine(model, tokenizer, share_prefixes=False) as engine:
            asking = Asking(engine, prompts, options.tokens)
            asking([])  # warm-up
            for kind in KINDS:
                for count in options.counts:
                    say(f"{kind}: {count} adapters", edited_beside_base(asking, folders[kind][:count], options.rounds))
        with EmbeddedEngine(model, tokenizer) as engine:
            asking = Asking(engine, [prompts[0]] * options.requests, options.tokens)
            asking(folders["l1, layer 8, r 4"])
            shared = engine.statistics()["prefix_tokens"]
            say(
                "l1: one prompt, an adapter each",
                {"prefix tokens shared": shared / (len(asking.prompts) * len(prompts[0]))},
            )
        say(
            f"LoRA r 8 on q and v, PEFT's mixed batch: {options.peer_adapters} adapters",
            lora_beside_base(model, prompts, options.tokens, options.peer_adapters, options.rounds),
        )
        if not options.skip_many:
            root = Path(temporary) / "many"
            save_many(model, root, KINDS["l1, layer 8, r 4"], MANY)
            del engine, asking, model
            say("registered: l1, layer 8, r 4", registered(root))


if __name__ == "__main__":
    main()
