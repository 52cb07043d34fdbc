"""Three curves: seconds of a cached step against prompt length, cache budget, and the number of edited layers.

Usage: python -m benchmarks.speed.curves OUTPUT_FOLDER   (also part of `make bench`)
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import torch  # noqa: E402
from peft import get_peft_model  # noqa: E402

import reftune  # noqa: E402
from reftune.data.collating import CompletionCollator  # noqa: E402
from reftune.models import load  # noqa: E402
from reftune.training.loss import completion_loss  # noqa: E402
from reftune.training.prefix.switch import PrefixSwitch  # noqa: E402

RESPONSE = 16
LENGTHS = (64, 128, 256, 512, 1024, 2048)
LAYERS = (1, 5, 10, 20, 30)
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


def rows_of(prompt: int, count: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(prompt)
    found = []
    for _ in range(count):
        ids = torch.randint(100, 40000, (prompt + RESPONSE,), generator=generator).tolist()
        found.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:], "prompt_length": prompt})
    return found


def model_with(layers: list[int], positions: str = "l1") -> Any:
    base, _ = load("smollm2")
    config = reftune.ReftConfig(r=4, layers_to_transform=layers, positions=positions, task_type="CAUSAL_LM")
    return get_peft_model(base, config).train()


def step_seconds(model: Any, batches: list[Any], switch: PrefixSwitch, passes: int) -> list[float]:
    """Seconds of every step after a first pass, which fills the store."""
    seconds: list[float] = []
    for turn in range(passes + 1):
        for batch in batches:
            begin = time.perf_counter()
            found = switch.forward(model, batch)
            completion_loss(found.logits, found.targets).backward()
            model.zero_grad()
            if turn:
                seconds.append(time.perf_counter() - begin)
        switch.next_pass()
    return seconds


def batched(rows: list[dict[str, Any]], size: int) -> list[Any]:
    collator = CompletionCollator(0)
    return [collator(rows[start : start + size]) for start in range(0, len(rows), size)]


def by_prompt_length(passes: int = 3) -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = {"prefix reuse, cached": {}, "prefix reuse off": {}}
    model = model_with([8])
    for length in LENGTHS:
        rows = rows_of(length, 4)
        for title, mode in (("prefix reuse, cached", "on"), ("prefix reuse off", "off")):
            if mode == "off" and length > 512:
                continue  # minutes a step on two cores; the slope is plain by then
            switch = PrefixSwitch(mode, None, [])
            found[title][length] = median(step_seconds(model, batched(rows, 4), switch, passes if mode == "on" else 1))
    return found


def by_budget(passes: int = 2) -> dict[float, float]:
    rows, model, found = rows_of(96, 24), model_with([8]), {}
    full = PrefixSwitch("on", None, [])
    step_seconds(model, batched(rows, 4), full, 0)
    need = full.summary()["memory_bytes"] / 1024**3
    for share in SHARES:
        switch = PrefixSwitch("on", need * share * 1.001, [], disk=False)
        found[share] = sum(step_seconds(model, batched(rows, 4), switch, passes)) / passes / 6
    return found


def by_layers(passes: int = 2) -> dict[str, dict[int, float]]:
    rows = rows_of(96, 8)
    found: dict[str, dict[int, float]] = {"l1": {}, "f7+l7": {}}
    for count in LAYERS:
        layers = list(range(30 - count, 30)) if count < 30 else list(range(30))
        for positions in found:
            switch = PrefixSwitch("auto", None, [])
            seconds = step_seconds(model_with(layers, positions), batched(rows, 8), switch, passes)
            found[positions][count] = median(seconds)
    return found


def draw(folder: Path) -> dict[str, Any]:
    """Measure, draw three pictures into the folder, and return the figures."""
    folder.mkdir(parents=True, exist_ok=True)
    lengths, budget, layers = by_prompt_length(), by_budget(), by_layers()
    pictures = (
        ("step_by_prompt_length.png", lengths, "prompt tokens", "Layer 8, l1, batch 4, 16 response tokens", True),
        ("step_by_cache_budget.png", {"mean step": budget}, "share of the data that fits", "96-token prompts", False),
        ("step_by_layers.png", layers, "edited layers (the topmost)", "96-token prompts, batch 8, later epochs", False),
    )
    for name, curves, label, title, logarithmic in pictures:
        figure, axes = plt.subplots(figsize=(6, 3.8), layout="constrained")
        for curve, points in curves.items():
            axes.plot(list(points), list(points.values()), marker="o", label=curve)
        if logarithmic:
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xticks(LENGTHS, [str(n) for n in LENGTHS])
        else:
            axes.set_ylim(bottom=0)
        axes.set_xlabel(label)
        axes.set_ylabel("seconds a step (2 cores, float32)")
        axes.set_title(title)
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(folder / name, dpi=130)
        plt.close(figure)
    return {"lengths": lengths, "budget": budget, "layers": layers}


if __name__ == "__main__":
    torch.set_num_threads(2)
    print(draw(Path(sys.argv[1])))
