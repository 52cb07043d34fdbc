"""Each method's learning rate: tried on validation rows with one seed, and kept in learning_rates.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.quality.tasks import Rows, Task, write_rows
from reftune.comparison import resolve_comparison, run_comparison, summarise
from reftune.output.files import write_text

FILE = Path(__file__).with_name("learning_rates.json")
"""By task and method, the loss on the validation rows of each rate."""
SEED = 0


def search(task: Task, output: Path, jobs: int) -> None:
    """Train every method that has several rates with each of them and write down what came of it."""
    rows, trials = Rows.of(task), {}
    for name, rates in _several(task).items():
        for rate in rates:
            trials[f"{name} @ {rate:g}"] = {**task.methods[name], "lr": rate}
    recipe = resolve_comparison(
        {
            **shared_settings(task, rows, output),
            "eval_file": write_rows(rows.validation, output / f"{task.name}-validation.jsonl"),
            "seeds": [SEED],
            "output": str(output / f"{task.name}-rates"),
            "methods": trials,
        }
    )
    found: dict[str, dict[str, float]] = {}
    for item in summarise(run_comparison(recipe, jobs=jobs)):
        name, _, rate = item.name.rpartition(" @ ")
        found.setdefault(name, {})[rate] = round(item.loss, 4)
    write_text(FILE, json.dumps({**_known(), task.name: found}, indent=1) + "\n")


def shared_settings(task: Task, rows: Rows, output: Path) -> dict[str, Any]:
    """What all methods of a task share, in a search as in the comparison."""
    return {
        "model": "smollm2",
        "epochs": 3,
        "train_file": write_rows(rows.train, output / f"{task.name}-train.jsonl"),
        **task.shared,
    }


def with_rates(task: Task) -> dict[str, Any]:
    """The task's methods, each with the rate that did best, or with its only one."""
    tried, several = tried_rates(task), _several(task)
    missing = [name for name in several if name not in tried]
    if missing:
        raise SystemExit(f"{task.name}: no learning rate is known for {', '.join(missing)}: run with --search first")
    best = {name: float(min(tried[name], key=tried[name].__getitem__)) for name in several}
    return {
        name: settings if settings == "base" else {**settings, "lr": best.get(name, settings["lr"][0])}
        for name, settings in task.methods.items()
    }


def _several(task: Task) -> dict[str, tuple[float, ...]]:
    """The methods that have more than one learning rate to choose from."""
    rates = {name: settings["lr"] for name, settings in task.methods.items() if settings != "base"}
    return {name: found for name, found in rates.items() if len(found) > 1}


def tried_rates(task: Task) -> dict[str, dict[str, float]]:
    """By method, the loss on the validation rows of each rate."""
    return _known().get(task.name, {})


def _known() -> dict[str, dict[str, dict[str, float]]]:
    return json.loads(FILE.read_text()) if FILE.exists() else {}
