"""The embedded engine's cost by adapters and positions: CPU seconds beside the base model and PEFT's LoRA, in pairs.

Usage: python -m benchmarks.serving.embedded [--rounds N] [--requests N] [--tokens N] [--counts N ...]

Every round runs each case and, right before or after it, the base model in the same engine, so that a busy machine
slows both. CPU seconds are those of the process, over all threads. Cases: adapters registered, by positions; adapters
active in one batch; even and Zipf traffic; a bank that holds an eighth of the adapters; prompt tokens shared between
adapters; PEFT's LoRA in a mixed batch; very many registered. ``--out FILE`` also writes what was measured as JSON
lines, of which ``python -m benchmarks.serving.plots FILE`` draws the pictures.
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
from statistics import median, quantiles
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

COUNTS = (1, 8, 64, 512, 1000)
ACTIVE = (1, 8, 64)
KINDS: dict[str, dict[str, Any]] = {
    "l1, layer 8, r 4": {"positions": "l1", "layers_to_transform": [8], "r": 4},
    "prompt, layer 8, r 4": {"positions": "prompt", "layers_to_transform": [8], "r": 4},
    "l1+generated, all layers, r 1": {"positions": "l1+generated", "r": 1},
    "all, layer 8, r 4": {"positions": "all", "layers_to_transform": [8], "r": 4},
}


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
        self.draw = torch.Generator().manual_seed(0)

    def __call__(self, folders: list[Path], zipf: bool = False) -> None:
        """Ask for all at once; without adapters, for the base.

        Adapters come from all over the list, in turn; with ``zipf`` the k-th of the list with a probability of 1 / k.
        """
        chosen: list[Path] = []
        if folders and zipf:
            weights = 1 / torch.arange(1, len(folders) + 1)
            drawn = torch.multinomial(weights, len(self.prompts), replacement=True, generator=self.draw)
            chosen = [folders[index] for index in drawn.tolist()]
        elif folders:
            step = max(1, len(folders) // len(self.prompts))
            chosen = [folders[number * step % len(folders)] for number in range(len(self.prompts))]

        async def one(number: int) -> None:
            adapters = [(chosen[number], 1.0)] if chosen else []
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


def edited_beside_base(asking: Asking, folders: list[Path], rounds: int, zipf: bool = False) -> dict[str, float]:
    """Medians over rounds; the order within a round alternates. The bank has read what its budget holds."""
    for folder in folders:
        asking.engine.check(folder)
    ratios, speeds, first, base_first = [], [], [], []
    for number in range(rounds):
        seconds = {}
        for edited in (number % 2 == 1, number % 2 == 0):
            seconds[edited] = cpu(lambda edited=edited: asking(folders if edited else [], zipf))
            (first if edited else base_first).extend(asking.first)
        ratios.append(seconds[False] / seconds[True])
        speeds.append(len(asking.prompts) * asking.tokens / seconds[True])
    return {
        "of base": median(ratios), "tokens a CPU second": median(speeds),
        "first token, s": median(first), "first token, p95, s": quantiles(first, n=20)[-1] if len(first) > 1 else first[0],
        "base: first token, s": median(base_first),
    }  # fmt: skip


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


def load_bytes(folder: Path) -> int:
    """Bytes that an adapter takes in a bank."""
    bank = Bank()
    bank.add("", folder)
    bank.give_back(bank.take(""))
    return bank.nbytes


def shared(engine: EmbeddedEngine, folders: list[Path]) -> float:
    """The share of a prompt of 256 tokens that an adapter takes from what another computed; the first is apart."""
    prompt = torch.randint(100, 40_000, (256,), generator=torch.Generator().manual_seed(1)).tolist()
    Asking(engine, [prompt], 2)(folders[:1])
    before = engine.statistics()["prefix_tokens"]
    others = folders[1:9]
    Asking(engine, [prompt] * len(others), 2)(others)
    return (engine.statistics()["prefix_tokens"] - before) / (len(others) * len(prompt))


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
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS, help="registered adapters")
    parser.add_argument("--active", type=int, nargs="+", default=ACTIVE, help="different adapters in one batch of 64")
    parser.add_argument("--many", type=int, default=10_000, help="registered for the last case; 0: left out")
    parser.add_argument("--out", type=Path, help="also write the JSON lines there")
    options = parser.parse_args()
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
    console = Console(width=200)
    lines: list[str] = []

    def say(case: str, found: dict[str, float], **about: Any) -> None:
        lines.append(json.dumps({"case": case, **about} | {name: round(value, 4) for name, value in found.items()}))
        console.print(lines[-1])
        if options.out:
            options.out.write_text("\n".join(lines) + "\n")

    model, tokenizer = load("smollm2")
    model.generation_config.eos_token_id = tokenizer.eos_token = None  # every answer has its full length
    chosen = torch.Generator().manual_seed(0)
    prompts = torch.randint(100, 40_000, (64, options.prompt), generator=chosen).tolist()
    with tempfile.TemporaryDirectory() as temporary:
        roots = {kind: Path(temporary) / str(index) for index, kind in enumerate(KINDS)}
        folders = {kind: save_many(model, roots[kind], KINDS[kind], max(options.counts)) for kind in KINDS}
        for kind in KINDS:
            say("load", load_times(folders[kind][:64]), kind=kind)
        first = next(iter(KINDS))
        with EmbeddedEngine(model, tokenizer, share_prefixes=False) as engine:
            asking = Asking(engine, prompts[: options.requests], options.tokens)
            asking([])  # warm-up
            for kind in KINDS:
                for count in options.counts:
                    found = edited_beside_base(asking, folders[kind][:count], options.rounds)
                    say("registered", found, kind=kind, adapters=count)
            found = edited_beside_base(asking, folders[first], options.rounds, zipf=True)
            say("zipf", found, kind=first, adapters=len(folders[first]))
            asking = Asking(engine, prompts, options.tokens)
            for count in options.active:
                found = edited_beside_base(asking, folders[first][:count], options.rounds)
                say("active in a batch of 64", found, kind=first, adapters=count)
        bank = Bank(max_bytes=len(folders[first]) // 8 * load_bytes(folders[first][0]))
        with EmbeddedEngine(model, tokenizer, bank=bank, share_prefixes=False) as engine:
            asking = Asking(engine, prompts[: options.requests], options.tokens)
            for zipf in (False, True):
                found = edited_beside_base(asking, folders[first], options.rounds, zipf)
                say("bank of an eighth" + ", zipf" * zipf, found, kind=first, adapters=len(folders[first]))
        with EmbeddedEngine(model, tokenizer) as engine:
            say(
                "one long prompt, an adapter each", {"prompt tokens shared": shared(engine, folders[first])}, kind=first
            )
        for count in (1, 8, options.requests):
            found = lora_beside_base(model, prompts[: options.requests], options.tokens, count, options.rounds)
            say("LoRA r 8 on q and v, PEFT's mixed batch", found, adapters=count)
        if options.many:
            root = Path(temporary) / "many"
            save_many(model, root, KINDS[first], options.many)
            del engine, asking, model
            say("very many", registered(root), kind=first)


if __name__ == "__main__":
    main()
