"""Held-out quality of ReFT beside LoRA and pyreft on tasks that SmolLM2-135M can learn; writes QUALITY.md.

Usage: python -m benchmarks.quality [--search] [--tasks arc,arithmetic,persona] [--seeds 0,1,2] [--jobs 2]

Every method trains with `reftune compare` on the same rows in the same order, with the learning rate that did best on
other rows (--search tries them and writes learning_rates.json). What was run is kept in the output folder, so that a
broken-off benchmark goes on, and the document can be written again from what is there (--document-only).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.quality.document import write_document
from benchmarks.quality.rates import search, shared_settings, with_rates
from benchmarks.quality.tasks import DATA, REFERENCE, TASKS, Rows, Task, write_rows
from benchmarks.speed.peers import interpreter
from reftune.comparison import Comparison, resolve_comparison, run_comparison, write_report
from reftune.models import bundled_folder, load
from reftune.output.files import write_text
from reftune.runs.completion import read_data
from reftune.runs.steps import encode_rows

HERE = Path(__file__).parent


def compare(task: Task, seeds: list[int], output: Path, jobs: int, document_only: bool) -> Comparison:
    rows, options = Rows.of(task), {}
    if rows.options:
        path = output / f"{task.name}-options.jsonl"
        options["options"] = write_rows(rows.options, path, ("prompt", "options", "answer"))
    recipe = resolve_comparison(
        {
            **shared_settings(task, rows, output),
            "eval_file": write_rows(rows.held_out, output / f"{task.name}-held-out.jsonl"),
            **options,
            "seeds": seeds,
            "output": str(output / task.name),
            "reference": REFERENCE,
            "title": task.title,
            "methods": with_rates(task),
        }  # fmt: skip
    )
    found = run_comparison(recipe, jobs=jobs, report_only=document_only)
    write_report(found)
    return found


def pyreft_losses(task: Task, comparison: Comparison, output: Path, document_only: bool) -> list[float]:
    """pyreft's held-out losses, a seed each, with the settings and rows of the method named by the task."""
    recipe = comparison.recipe
    method = recipe.method(task.pyreft)
    _, tokenizer = load("smollm2")
    rows, held_out = (
        [dict(row) for row in encode_rows(part, method.train, tokenizer)] for part in read_data(recipe.shared)
    )
    layers = list(range(30)) if method.train.layers == "all" else method.train.layers
    losses = []
    for seed in recipe.seeds:
        file = output / f"{task.name}-pyreft-seed{seed}.json"
        if not file.exists() and not document_only:
            settings: dict[str, Any] = {
                "rows": rows, "held_out": held_out, "pad": tokenizer.pad_token_id, "layers": layers, "seed": seed,
                "rank": method.train.rank, "positions": method.train.positions, "lr": method.train.lr,
                "batch_size": recipe.shared.batch_size, "epochs": int(recipe.shared.epochs),
            }  # fmt: skip
            work = output / "pyreft-task.json"
            work.write_text(json.dumps(settings))
            command = [str(interpreter("pyreft")), str(HERE / "worker_pyreft.py"), str(work), str(bundled_folder())]
            done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
            lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
            if done.returncode or not lines:
                raise RuntimeError(f"pyreft failed:\n{done.stderr[-2000:]}")
            write_text(file, lines[-1].removeprefix("RESULT "))
        if file.exists():
            losses.append(json.loads(file.read_text())["loss"])
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default=",".join(TASKS), help="which of the tasks")
    parser.add_argument("--seeds", default="0,1,2", help="seeds of every method")
    parser.add_argument(
        "--jobs", type=int, default=2, help="runs at a time, one thread each where it is 2 on two cores"
    )
    parser.add_argument("--output", type=Path, default=Path("out/quality"), help="where runs are kept")
    parser.add_argument("--document-only", action="store_true", help="run nothing; write QUALITY.md from what is there")
    parser.add_argument("--search", action="store_true", help="choose the learning rates, and nothing else")
    parser.add_argument("--without-pyreft", action="store_true", help="leave pyreft out")
    arguments = parser.parse_args()
    if not DATA.is_dir():
        raise SystemExit(f"{DATA} is not there: the tasks need arc_easy and arithmetic")
    output = arguments.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    found = []
    for name in arguments.tasks.split(","):
        task = TASKS[name]
        Console(stderr=True).print(f"[bold]{task.title}")
        if arguments.search:
            search(task, output, arguments.jobs)
            continue
        comparison = compare(task, seeds, output, arguments.jobs, arguments.document_only)
        peer = []
        if task.pyreft and not arguments.without_pyreft:
            peer = pyreft_losses(task, comparison, output, arguments.document_only)
        found.append((task, comparison, peer))
    if not arguments.search:
        write_document(found, HERE.parent / "QUALITY.md", HERE.parent / "pictures")


if __name__ == "__main__":
    main()
