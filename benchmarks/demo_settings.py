"""Which settings suit the demo: one row of docs/decisions/0003-demo-settings.md for each name.

    python -m benchmarks.demo_settings            # all, about a minute each on two cores
    python -m benchmarks.demo_settings l1-five    # one

Eight of the 84 rows are held out for the loss; style is measured on the twelve held-out prompts, as in the demo.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from typing import Any

from rich.console import Console

from reftune.cli.app import quieten
from reftune.data.persona import in_style, load_heldout
from reftune.inference.generation import generate_answers
from reftune.runs import run_training
from reftune.runs.demo import DEMO, WRITING

THREE, FOUR, FIVE = [8, 16, 24], [10, 14, 18, 22], [8, 12, 16, 20, 24]
SETTINGS: dict[str, dict[str, Any]] = {
    "l1-five": {"layers": FIVE, "positions": "l1"},
    "l1-all": {"layers": "all", "positions": "l1", "rank": 2, "lr": 3e-3},
    "l5-five": {"layers": FIVE, "positions": "l5"},
    "f1l3-three": {"layers": THREE, "positions": "f1+l3"},
    "f1l3-three-4": {"layers": THREE, "positions": "f1+l3", "epochs": 4, "lr": 8e-3},
    "f1l5-five": {"layers": FIVE, "positions": "f1+l5"},
    "f1l5-five-4": {"layers": FIVE, "positions": "f1+l5", "epochs": 4, "lr": 8e-3},
    "prompt-four": {"layers": FOUR, "positions": "prompt"},
    "all-four": {"layers": FOUR, "positions": "all"},
}
COMMON: dict[str, Any] = {"rank": 4, "lr": 6e-3, "epochs": 3, "batch_size": 4, "eval_fraction": 0.1}
PENALTIES = (1.0, 1.1, 1.15)


def measure(name: str, console: Console) -> None:
    """Train one setting and print its row."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = replace(DEMO, **{**COMMON, **SETTINGS[name]}, output=folder)
        run = run_training(recipe)
        prompts = load_heldout()
        written = {
            p: list(generate_answers(run.edited, prompts, replace(WRITING, repetition_penalty=p))) for p in PENALTIES
        }
        shares = [
            f"{sum(in_style(a.text, hit_token_limit=a.hit_limit) for a in row)}/{len(row)}" for row in written.values()
        ]
        facts = run.metrics
        cells = [
            name, recipe.layers, recipe.positions, recipe.rank, f"{recipe.lr:g}", f"{recipe.epochs:g}",
            f"{facts['trainable_parameters']:,}", f"{sum(facts['epoch_seconds']):.0f}", f"{facts['eval_loss']:.3f}", *shares,
        ]  # fmt: skip
        console.print("| " + " | ".join(map(str, cells)) + " |", soft_wrap=True, highlight=False, markup=False)
        for prompt, answer in zip(prompts, written[WRITING.repetition_penalty], strict=True):
            console.print(f"    {prompt} => {answer.text}", soft_wrap=True, highlight=False, markup=False)


def main() -> None:
    quieten()
    console = Console()
    heads = ["setting", "layers", "positions", "rank", "lr", "epochs", "parameters", "seconds", "held-out loss"]
    heads += [f"in style, penalty {penalty:g}" for penalty in PENALTIES]
    console.print("| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|", soft_wrap=True, markup=False)
    for name in sys.argv[1:] or SETTINGS:
        measure(name, console)


if __name__ == "__main__":
    main()
