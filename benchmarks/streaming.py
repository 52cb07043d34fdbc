"""The memory of a streamed training against the number of its rows.

Usage: python -m benchmarks.streaming [--rows 10000,1000000] [--steps 200]

Each run is a process of its own: a Llama of two layers with random weights, short rows, the CPU; it trains, and then
reads a whole pass of the rows. Prints the most memory that each process had, and the ratio of the largest's to the
smallest's.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from itertools import islice
from pathlib import Path

from tests.cli.tiny_folder import save_tiny_model


def write_rows(path: Path, count: int) -> Path:
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            file.write(json.dumps({"prompt": f"What is {number}?", "completion": f"It is number {number}."}) + "\n")
    return path


def train(rows: Path, model: Path, output: Path, steps: int) -> None:
    """Train in this process, read a whole pass, and print the peak memory in bytes."""
    from reftune.data.streaming import StreamedRows
    from reftune.runs import run_training
    from reftune.runs.completion import read_data
    from reftune.runs.recipe import TrainRecipe

    recipe = TrainRecipe(
        train_file=str(rows), model=str(model), output=str(output), layers=[1], device="cpu", batch_size=8,
        streaming=True, max_steps=steps, tensorboard=False,
    )  # fmt: skip
    edited = run_training(recipe).edited
    examples, _ = read_data(recipe)
    stream = StreamedRows(str(rows), examples, recipe.encoding(edited.tokenizer), recipe.stream_buffer, recipe.seed)
    for _ in islice(iter(stream), sum(1 for _ in rows.open(encoding="utf-8"))):
        pass  # a whole pass, of which the training has seen the beginning
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="10000,1000000")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        train(*map(Path, options.one), steps=options.steps)
        return
    peaks = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = save_tiny_model(folder / "model")
        for count in map(int, options.rows.split(",")):
            rows = write_rows(folder / f"{count}.jsonl", count)
            command = [sys.executable, "-m", "benchmarks.streaming", "--steps", str(options.steps), "--one"]
            command += [str(rows), str(model), str(folder / f"out-{count}")]
            ran = subprocess.run(command, capture_output=True, text=True, check=True)
            peaks.append(int(ran.stdout.split()[-1]))
            print(f"{count:>12,} rows ({rows.stat().st_size / 1e6:7.1f} MB)  {peaks[-1] / 1e6:7.1f} MB")
    print(f"{max(peaks) / min(peaks):.3f} times the memory")


if __name__ == "__main__":
    main()
