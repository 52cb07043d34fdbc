"""PEFT's method comparison (MetaMathQA) with edits in it, in PEFT's layout.

    python -m benchmarks.peft_comparison FOLDER [--only direft] [--resume]
    python -m benchmarks.peft_comparison FOLDER --full --model meta-llama/Llama-3.2-3B \\
        --train meta-math/MetaMathQA --test gsm8k_test.jsonl

Without --full: the bundled model and rows made here, 8 steps of 4; ten minutes of one core for all. With it:
PEFT's own settings, 5,000 steps, on a GPU. Each experiment has a process of its own, and a JSON file in FOLDER with
PEFT's fields; RESULTS.md beside them is made from all that are there.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from pathlib import Path
from typing import Any

from benchmarks.peft_comparison.methods import experiments
from benchmarks.peft_comparison.rows import made, plain_texts, read

VALID, SHORT_VALID, TEST = 50, 4, 16
STEPS, BATCH = 8, 4


def table(folder: Path) -> str:
    """A Markdown table of the records in a folder, by method and number of parameters."""
    heads = ["experiment", "parameters", "test accuracy", "train loss", "forgetting", "peak MiB", "train s", "file kB"]
    rows: list[tuple[Any, ...]] = []
    for path in folder.glob("*.json"):
        record = json.loads(path.read_text(encoding="utf-8"))
        info, last = record["train_info"], record["train_info"]["metrics"][-1]
        name = record["run_info"]["experiment_name"]
        peak = info["accelerator_memory_max"]
        rows.append((
            name.partition("/")[0], info["num_trainable_params"], name, f"{info['num_trainable_params']:,}",
            f"{last['test accuracy']:.3f}", f"{last['train loss']:.3f}", f"{last['forgetting']:+.3f}",
            "" if peak is None else f"{peak / 2**20:,.0f}", f"{info['train_time']:.0f}", f"{info['file_size'] / 1000:,.0f}",
        ))  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", "|---" + "|---:" * (len(heads) - 1) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row[2:])} |" for row in sorted(rows, key=lambda row: row[:3]))]) + "\n"


def record(name: str, args: argparse.Namespace) -> None:
    """Run one experiment in this process and write its file."""
    from benchmarks.peft_comparison.loop import Data, TrainConfig, run_experiment

    experiment = next(item for item in experiments(args.model) if item.name == name)
    if args.full:
        settings = TrainConfig(model_id=args.model)
        train, test = read(args.train), read(args.test, "test")
        data = Data(train, test[:VALID], test[VALID:], plain_texts())
    else:
        settings = TrainConfig(
            model_id=args.model, dtype="float32", max_steps=args.steps, eval_steps=args.steps, batch_size=BATCH,
            generation_kwargs={"max_length": 800, "max_new_tokens": 24},
        )  # fmt: skip
        held = SHORT_VALID + args.test_rows
        rows = read(args.train) if args.train else made(held + args.steps * BATCH, seed=0)
        data = Data(rows[held:], rows[:SHORT_VALID], rows[SHORT_VALID:held], plain_texts())
    found = run_experiment(experiment, settings, data, short=not args.full)
    path = args.folder / f"{name.replace('/', '--')}.json"
    path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    """Run what is asked for, each experiment in its own process."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peft_comparison")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--train", help="rows with query and response; made here without --full")
    parser.add_argument("--test", help="rows with question and answer; with --full")
    parser.add_argument("--full", action="store_true", help="PEFT's own settings")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--test-rows", type=int, default=TEST)
    parser.add_argument("--only", default="", help="experiments whose name holds this")
    parser.add_argument("--resume", action="store_true", help="leave out those whose record is there")
    args = parser.parse_args(argv)
    if args.full and not (args.train and args.test):
        parser.error("--full needs --train and --test")
    args.folder.mkdir(parents=True, exist_ok=True)
    context: Any = multiprocessing.get_context("spawn" if args.full else "fork")
    for experiment in experiments(args.model):
        done = (args.folder / f"{experiment.name.replace('/', '--')}.json").is_file()
        if args.only in experiment.name and not (args.resume and done):
            print(experiment.name, flush=True)
            process = context.Process(target=record, args=(experiment.name, args))
            process.start()
            process.join()
            if process.exitcode:
                raise SystemExit(process.exitcode)
    print(table(args.folder))


if __name__ == "__main__":
    main()
