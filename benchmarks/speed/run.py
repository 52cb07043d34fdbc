"""Runs the workers in turn, round by round, and keeps every figure."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.speed.peers import interpreter
from benchmarks.speed.settings import ROOT, SYSTEMS

HERE = Path(__file__).parent


def run_worker(task: Path, system: str, epochs: int, *more: str) -> dict[str, Any]:
    """One process; its JSON result.

    Raises:
        RuntimeError: the worker failed; its last lines.
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2"}
    if system in ("pyreft", "adapters"):
        from reftune.models import bundled_folder

        script = HERE / {"pyreft": "pyreft_training.py", "adapters": "worker_adapters.py"}[system]
        command = [str(interpreter(system)), str(script), str(task), str(epochs), str(bundled_folder())]
    else:
        command = [sys.executable, "-m", "benchmarks.speed.worker", str(task), system, str(epochs), *more]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        raise RuntimeError(f"{system} failed:\n{done.stderr[-2000:]}")
    return json.loads(lines[-1].removeprefix("RESULT "))


def measure(task: Path, systems: list[str], rounds: int, say: Any) -> dict[str, list[dict[str, Any]]]:
    """Every system once a round, interleaved."""
    found: dict[str, list[dict[str, Any]]] = {system: [] for system in systems}
    for turn in range(rounds):
        for system in systems:
            epochs = 3 if system == "reftune" else 2 if system in SYSTEMS else 2
            say(f"{task.stem}: round {turn + 1}, {system}")
            found[system].append(run_worker(task, system, epochs))
    return found


def spread(values: list[float]) -> tuple[float, float, float]:
    """Median, smallest, largest."""
    return median(values), min(values), max(values)


def columns(results: list[dict[str, Any]]) -> dict[str, tuple[float, float, float]]:
    """First epoch, later epochs, three epochs, peak memory: medians with ranges over the rounds."""
    first = [result["epoch_seconds"][0] for result in results]
    later = [median(result["epoch_seconds"][1:]) for result in results]
    return {
        "first": spread(first),
        "later": spread(later),
        "three": spread([a + 2 * b for a, b in zip(first, later, strict=True)]),
        "memory": spread([float(result["peak_memory_bytes"]) for result in results]),
    }
