"""GRPO on short sums with SmolLM2-135M: edits beside LoRA and full tuning, reward by step and by second; writes RESULTS.md.

Usage: python -m benchmarks.reinforcement [--seeds 0,1,2] [--output out/reinforcement] [--document-only]

The task is that of examples/grpo_arithmetic.py. Each method is tried at two learning rates with the first seed; the one
with the higher reward over the second half of its steps is run with the other seeds. Every run is kept in the output
folder, so that a broken-off benchmark goes on.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from peft import LoraConfig

import reftune
from examples.grpo_arithmetic import EDIT, train
from reftune.output.files import write_text
from reftune.output.pictures import new_figure, save_figure

HERE = Path(__file__).parent
PICTURE = HERE.parents[1] / "docs" / "images" / "reinforcement.png"
STEPS = 20
METHODS: dict[str, tuple[str, tuple[float, float], str]] = {
    "LoRA r8": ("lora", (1e-3, 3e-3), "#64748b"),
    "LoReFT r1": ("loreft", (2e-3, 4e-3), "#1d4ed8"),
    "DiReFT r1": ("direft", (2e-3, 4e-3), "#b45309"),
    "a vector a layer": ("lobireft", (1e-2, 5e-2), "#15803d"),
    "full tuning": ("full", (1e-5, 3e-5), "#be185d"),
}
"""By name: the method, the learning rates that are tried, and the colour of its line."""
Run = dict[str, Any]


def adapter(method: str) -> Any:
    if method == "full":
        return None
    if method == "lora":
        return LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return reftune.ReftConfig(method=method, **EDIT)


def run(name: str, lr: float, seed: int, output: Path, document_only: bool) -> Run | None:
    """One run, from the folder where it is kept."""
    method = METHODS[name][0]
    file = output / f"{method}-{lr:g}-seed{seed}.json"
    if not file.exists():
        if document_only:
            return None
        with tempfile.TemporaryDirectory() as folder:
            found = train(adapter(method), lr=lr, steps=STEPS, seed=seed, output=folder)
        write_text(file, json.dumps(found) + "\n")
    return json.loads(file.read_text(encoding="utf-8"))


def late(found: Run) -> float:
    """The mean reward over the second half of the steps."""
    return mean(found["rewards"][STEPS // 2 :])


def smoothed(values: list[float], width: int = 3) -> list[float]:
    return [mean(values[max(0, at - width + 1) : at + 1]) for at in range(len(values))]


def draw(runs: dict[str, list[Run]]) -> None:
    figure, panels = new_figure((8.6, 3.4), grid=True, panels=2)
    for name, found in runs.items():
        rewards = [mean(at) for at in zip(*(smoothed(one["rewards"]) for one in found), strict=True)]
        seconds = [mean(at) for at in zip(*(one["seconds"] for one in found), strict=True)]
        for axes, across in zip(panels, (range(1, STEPS + 1), seconds), strict=True):
            axes.plot(across, rewards, color=METHODS[name][2], label=name, linewidth=1.6)
    panels[0].set(xlabel="step (2 sums, 8 answers each)", ylabel="reward, mean of three steps", ylim=(0, 1.9))
    panels[0].set(xticks=range(0, STEPS + 1, 5))
    panels[1].set(xlabel="seconds of one processor", ylim=(0, 1.9))
    for axes in panels:
        axes.legend(frameon=False, loc="upper left", ncol=2)
    save_figure(figure, PICTURE)


def document(runs: dict[str, list[Run]], rates: dict[str, float], tried: dict[str, dict[float, float]]) -> str:
    lines = [
        "# Reinforcement learning: edits beside LoRA and full tuning", "",
        f"`python -m benchmarks.reinforcement`, one thread of a shared two-core machine, torch {torch.__version__}, float32.",
        "",
        "GRPO (TRL, no reference model, constant learning rate) on SmolLM2-135M-Instruct and the sums of "
        "[examples/grpo_arithmetic.py](../../examples/grpo_arithmetic.py): `What is 3 + 4? It is`. A right first number is 1 "
        f"point, saying it at once half a point. {STEPS} steps of 2 sums and 8 sampled answers of 6 tokens. Edits act on every "
        "layer at `l1+generated`, a vector too; LoRA on `q_proj` and `v_proj`. Held out: greedy answers to 16 sums that are not trained on.",
        "",
        "| method | parameters | learning rate | seeds | reward, first 3 steps | second half of the steps | held out, before | after | seconds a step |",
        "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, found in runs.items():
        spread = [late(one) for one in found]
        second_half = f"{mean(spread):.2f}" + (f" ({min(spread):.2f} to {max(spread):.2f})" if len(found) > 1 else "")
        cells = [
            name, f"{found[0]['parameters']:,}", f"{rates[name]:g}", len(found),
            f"{mean(mean(one['rewards'][:3]) for one in found):.2f}", second_half,
            f"{mean(one['before'] for one in found):.2f}", f"{mean(one['after'] for one in found):.2f}",
            f"{mean(one['seconds'][-1] / len(one['seconds']) for one in found):.1f}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += ["", "Reward over the second half of the steps, by learning rate, first seed:", "", "| method | | |", "|---|---|---|"]  # fmt: skip
    for name, by_rate in tried.items():
        lines.append(f"| {name} | " + " | ".join(f"{lr:g}: {score:.2f}" for lr, score in by_rate.items()) + " |")
    lines += [
        "",
        "A step's reward is the mean of 16 answers, so that methods 0.2 apart in one seed are not told apart; the rate was "
        "chosen by the runs that are shown. The rewarded answer is the shortest one, and the base's likeliest answers are "
        "right more often than its sampled ones: what is learnt is to say what it knows, not to add.",
    ]
    return "\n".join([*lines, "", f"![Reward by step and by second](../../docs/images/{PICTURE.name})", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0", help="seeds of every method")
    parser.add_argument("--output", type=Path, default=Path("out/reinforcement"), help="where runs are kept")
    parser.add_argument("--document-only", action="store_true", help="run nothing; write RESULTS.md from what is there")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    kept = arguments.output, arguments.document_only
    arguments.output.mkdir(parents=True, exist_ok=True)
    rates, tried, runs = {}, {}, {}
    for place in (0, 1):
        for name, (_, candidates, _) in METHODS.items():
            if found := run(name, candidates[place], seeds[0], *kept):
                tried.setdefault(name, {})[candidates[place]] = late(found)
    for name, by_rate in tried.items():
        rates[name] = max(by_rate, key=by_rate.__getitem__)
    for seed in seeds:
        for name, lr in rates.items():
            if found := run(name, lr, seed, *kept):
                runs.setdefault(name, []).append(found)
    draw(runs)
    write_text(HERE / "RESULTS.md", document(runs, rates, tried))


if __name__ == "__main__":
    main()
