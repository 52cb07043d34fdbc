"""Everything that README and docs claim about time and memory, measured beside the peers in one run.

Usage: make bench            or  python -m benchmarks [--settings a,b,c,d,e] [--rows N] [--rounds N] [--without-peers]

Prints one table, writes benchmarks/RESULTS.md and pictures into benchmarks/pictures/. The peers' environments are built
on first use. A full run takes about an hour on two cores; figures of a loaded machine say nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import generation
from benchmarks.speed import curves
from benchmarks.speed.run import columns, measure, run_worker
from benchmarks.speed.settings import DATA, SETTINGS, SYSTEMS, prepare

HERE = Path(__file__).parent
GIB = 1024**3


def shown(value: tuple[float, float, float], scale: float = 1.0) -> str:
    middle, low, high = (x / scale for x in value)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})" if high > low else f"{middle:.2f}"


def table_of(setting: Any, task: Path, results: dict[str, list[dict[str, Any]]]) -> tuple[Table, list[str]]:
    """One setting as a rich table and as Markdown lines."""
    rows = json.loads(task.read_text())["rows"]
    tokens = sum(len(row["input_ids"]) for row in rows)
    figures = {system: columns(found) for system, found in results.items()}
    floor = figures["floor"]["later"][0] if "floor" in figures else float("nan")
    ours = figures["reftune"]
    heads = [
        "system", "first epoch s", "later epochs s", "three epochs s", "tokens/s later", "peak GiB", "/ floor",
        "later: theirs / ours", "three: theirs / ours",
    ]  # fmt: skip
    size = f"{len(rows)} rows, {tokens} tokens, batch {setting.batch_size}"
    table = Table(title=f"({setting.name}) {setting.title}: {size}")
    lines = [f"### ({setting.name}) {setting.title}", "", f"{size}.", ""]
    lines += ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for head in heads:
        table.add_column(head)
    for system, found in figures.items():
        cells = [
            SYSTEMS[system], shown(found["first"]), shown(found["later"]), shown(found["three"]),
            f"{tokens / found['later'][0]:.0f}", shown(found["memory"], GIB), f"{found['later'][0] / floor:.2f}",
            f"{found['later'][0] / ours['later'][0]:.2f}", f"{found['three'][0] / ours['three'][0]:.2f}",
        ]  # fmt: skip
        table.add_row(*cells)
        lines.append("| " + " | ".join(cells) + " |")
    store = results["reftune"][-1].get("prefix_store") or {}
    status = results["reftune"][-1].get("prefix_reuse")
    lines += ["", f"Prefix reuse: {status}; store: {json.dumps(store)}.", ""]
    return table, lines


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", default="a,b,c,d,e", help="rows of the table")
    parser.add_argument("--rows", type=int, default=24, help="examples of each data set")
    parser.add_argument("--rounds", type=int, default=2, help="times that every system is run, interleaved")
    parser.add_argument("--without-peers", action="store_true", help="leave pyreft and adapters out")
    parser.add_argument("--without-curves", action="store_true", help="leave the three pictures out")
    arguments = parser.parse_args()
    console = Console(width=170)
    torch.set_num_threads(2)
    work = Path(tempfile.mkdtemp(prefix="reftune-bench-"))
    systems = [s for s in SYSTEMS if not (arguments.without_peers and s in ("pyreft", "adapters"))]
    lines = [
        "# Results", "",
        f"`make bench` on {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, float32, "
        f"SmolLM2-135M-Instruct; {arguments.rows} rows a setting, {arguments.rounds} interleaved rounds, medians with "
        "ranges. Every system trains on the same token batches with its own trainer. No GPU was used: "
        "`benchmarks/gpu.py` is for real sizes and has not been run.", "",
    ]  # fmt: skip
    if not DATA.is_dir():
        raise SystemExit(f"{DATA} is not there: the speed table needs arc_easy, arithmetic and ojousama.csv")
    for name in arguments.settings.split(","):
        task = prepare(SETTINGS[name], arguments.rows, work)
        table, more = table_of(SETTINGS[name], task, measure(task, systems, arguments.rounds, console.print))
        console.print(table)
        lines += more
    if "a" in arguments.settings.split(","):
        found = run_worker(work / "a.json", "reuse-floor", 3)
        ratio = median(a / b for a, b in zip(found["ours"], found["floor"], strict=True))
        line = f"Cached step of (a) against its own floor (same tails and blocks, prefix given, no edit): {ratio:.2f}."
        console.print(line)
        lines += [line, ""]
    lines += [
        "## Generation",
        "",
        "`python -m benchmarks.generation`: CPU time edited / base, pairs of 64-token runs.",
        "",
    ]
    lines += ["| adapter | median | smallest | largest | edits run in a generation |", "|---|---|---|---|---|"]
    for title, ratios, calls in generation.main():
        lines.append(f"| {title} | {median(ratios):.3f} | {min(ratios):.3f} | {max(ratios):.3f} | {calls} |")
    if not arguments.without_curves:
        figures = curves.draw(HERE / "pictures")
        lines += ["", "## Curves", ""]
        lines += [
            f"![{name}](pictures/{name})" for name in sorted(p.name for p in (HERE / "pictures").glob("step_*.png"))
        ]
        lines += ["", "```json", json.dumps(figures, indent=1), "```"]
    (HERE / "RESULTS.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
