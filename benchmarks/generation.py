"""What a prompt-position adapter costs in generation: CPU seconds of edited runs against the base model, in pairs.

Usage: python -m benchmarks.generation [--pairs N] [--tokens N]
"""

from __future__ import annotations

import argparse
import time
from statistics import median

import torch
from peft import get_peft_model
from rich.console import Console
from rich.table import Table

import reftune
from reftune.engine.hooks import Engine
from reftune.models import load


def cpu_seconds(model: torch.nn.Module, inputs: dict[str, torch.Tensor], tokens: int) -> float:
    """CPU seconds of one greedy generation of exactly so many tokens."""
    begin = time.process_time()
    model.generate(**inputs, min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False)  # type: ignore[operator]
    return time.process_time() - begin


def measure(pairs: int, tokens: int, layers: list[int] | str, positions: str) -> tuple[list[float], int]:
    """Ratios edited / base of each pair (the order alternates), and how often an edit ran in one generation."""
    base, tokenizer = load("smollm2")
    model = get_peft_model(
        base, reftune.ReftConfig(r=4, layers_to_transform=layers, positions=positions, task_type="CAUSAL_LM")
    ).eval()
    messages = [{"role": "user", "content": "Why is the sky blue in the daytime and red in the evening?"}]
    inputs = dict(
        tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    )
    engine = Engine.of(model.get_base_model())
    assert engine is not None
    calls: list[int] = []
    for edit in engine.edits("default").values():
        edit.register_forward_hook(lambda *_: calls.append(1))
    ratios = []
    for pair in range(pairs + 1):

        def run_base() -> float:
            with model.disable_adapter():
                return cpu_seconds(model, inputs, tokens)

        def run_edited() -> float:
            return cpu_seconds(model, inputs, tokens)

        if pair % 2:
            plain, edited = run_base(), run_edited()
        else:
            edited, plain = run_edited(), run_base()
        if pair:  # the first pair warms up
            ratios.append(edited / plain)
    return ratios, len(calls) // (pairs + 1)


def main() -> list[tuple[str, list[float], int]]:
    """Print and return the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=9, help="pairs of runs")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens")
    arguments, _ = parser.parse_known_args()
    torch.set_num_threads(2)
    table = Table(title=f"CPU time of generating {arguments.tokens} tokens, edited / base, SmolLM2-135M float32")
    for name in ("adapter", "median", "smallest", "largest", "edits run", "bar"):
        table.add_column(name)
    found = []
    for title, layers, positions in (("layer 8, l1", [8], "l1"), ("all 30 layers, f7+l7", "all", "f7+l7")):
        ratios, calls = measure(arguments.pairs, arguments.tokens, layers, positions)
        found.append((title, ratios, calls))
        table.add_row(
            title, f"{median(ratios):.3f}", f"{min(ratios):.3f}", f"{max(ratios):.3f}", str(calls), "at most 1.03"
        )
    Console().print(table)
    return found


if __name__ == "__main__":
    main()
