"""What a start costs, as a ratio to an empty Python start.

Usage: python -m benchmarks.startup [--rounds N]

CPU seconds (user and system) of the process, the least of N rounds, so that a busy machine changes little. Prints a
table and the line that RESULTS.md holds.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

LIBRARIES, OURS, EMPTY = "import torch, transformers, peft", "import reftune", "python -c pass"
MAKE_ADAPTER = """
import sys, reftune
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
model = LlamaForCausalLM(LlamaConfig(**sizes))
get_peft_model(model, reftune.ReftConfig(task_type="CAUSAL_LM")).save_pretrained(sys.argv[1])
"""


def cpu_seconds(command: list[str], rounds: int) -> float:
    """The least CPU seconds of a process in several rounds; what it prints and its exit status do not matter."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    taken = []
    for _ in range(rounds):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, env=environment, capture_output=True, check=False)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        taken.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(taken)


def commands(adapter: str) -> dict[str, list[str]]:
    """What is measured, by its name in the table."""
    line = [sys.executable, "-c", "from reftune_command import main; main()"]
    told = ("--help", "--version", "train --help", "train --nonsense", "train --rank x")
    return {
        EMPTY: [sys.executable, "-c", "pass"],
        **{f"reftune {words}": [*line, *words.split()] for words in told},
        "reftune info DIR": [*line, "info", adapter],
        LIBRARIES: [sys.executable, "-c", LIBRARIES],
        OURS: [sys.executable, "-c", OURS],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        adapter = str(Path(folder) / "adapter")
        subprocess.run([sys.executable, "-c", MAKE_ADAPTER, adapter], check=True, capture_output=True)
        taken = {name: cpu_seconds(command, rounds) for name, command in commands(adapter).items()}
    for name, seconds in taken.items():
        print(f"{name:36} {seconds:6.2f} s   {seconds / taken[EMPTY]:6.1f} x an empty start")
    print(f"\n{OURS} costs {taken[OURS] / taken[LIBRARIES]:.2f} of {LIBRARIES}")


if __name__ == "__main__":
    main()
