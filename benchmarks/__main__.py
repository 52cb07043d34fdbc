"""Everything that README and docs claim about time and memory, measured beside the peers in one run.

Usage: make bench            or  python -m benchmarks [--parts a,b,c,d,e,reuse-floor,generation,curves] [--rows N] [--rounds N]

Prints tables, writes benchmarks/RESULTS.md and pictures into benchmarks/pictures/. Each part's figures are kept in the
output folder: parts that are there are measured again only where they are named, and the document holds all of them. The
peers' environments are built on first use. A full run takes about an hour on two cores; a loaded machine's figures say
nothing.
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
from reftune.output.files import write_text

HERE = Path(__file__).parent
GIB = 1024**3


def shown(value: tuple[float, float, float], scale: float = 1.0) -> str:
    middle, low, high = (x / scale for x in value)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})" if high > low else f"{middle:.2f}"


def table_of(found: dict[str, Any]) -> tuple[Table, list[str]]:
    """One setting as a rich table and as Markdown lines."""
    results: dict[str, list[dict[str, Any]]] = found["results"]
    tokens, setting = found["tokens"], SETTINGS[found["setting"]]
    figures = {system: columns(runs) for system, runs in results.items()}
    floor = figures["floor"]["later"][0] if "floor" in figures else float("nan")
    ours = figures["reftune"]
    heads = [
        "system", "first epoch s", "later epochs s", "three epochs s", "tokens/s later", "peak GiB", "/ floor",
        "later: theirs / ours", "three: theirs / ours",
    ]  # fmt: skip
    size = f"{found['rows']} rows, {tokens} tokens ({found['padded']} with padding), batch {setting.batch_size}, {found['rounds']} rounds"
    table = Table(title=f"({setting.name}) {setting.title}: {size}")
    lines = [f"### ({setting.name}) {setting.title}", "", f"{size}.", ""]
    lines += ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for head in heads:
        table.add_column(head)
    for system, run in figures.items():
        cells = [
            SYSTEMS[system], shown(run["first"]), shown(run["later"]), shown(run["three"]),
            f"{tokens / run['later'][0]:.0f}", shown(run["memory"], GIB), f"{run['later'][0] / floor:.2f}",
            f"{run['later'][0] / ours['later'][0]:.2f}", f"{run['three'][0] / ours['three'][0]:.2f}",
        ]  # fmt: skip
        table.add_row(*cells)
        lines.append("| " + " | ".join(cells) + " |")
    store = results["reftune"][-1].get("prefix_store") or {}
    status = results["reftune"][-1].get("prefix_reuse")
    lines += ["", f"Prefix reuse: {status}; store: {json.dumps(store)}.", ""]
    return table, lines


def measure_setting(name: str, rows: int, rounds: int, systems: list[str], say: Any) -> dict[str, Any]:
    setting = SETTINGS[name]
    task = prepare(setting, rows, Path(tempfile.mkdtemp(prefix="reftune-bench-")))
    examples = json.loads(task.read_text())["rows"]
    encoded = [len(row["input_ids"]) for row in examples]
    size = setting.batch_size
    batches = [encoded[start : start + size] for start in range(0, len(encoded), size)]
    return {
        "setting": name, "rows": len(encoded), "tokens": sum(encoded), "rounds": rounds,
        "padded": sum(len(batch) * max(batch) for batch in batches),
        "learned": sum(label != -100 for row in examples for label in row["labels"][1:]),
        "results": measure(task, systems, rounds, say),
    }  # fmt: skip


def measure_reuse_floor(rows: int) -> dict[str, Any]:
    task = prepare(SETTINGS["a"], rows, Path(tempfile.mkdtemp(prefix="reftune-bench-")))
    found = run_worker(task, "reuse-floor", 3)
    return {"ratios": [a / b for a, b in zip(found["ours"], found["floor"], strict=True)]}


def document(output: Path) -> list[str]:
    """Everything that was measured, as Markdown."""
    kept = {file.stem: json.loads(file.read_text()) for file in sorted(output.glob("*.json"))}
    lines = [
        "# Results", "",
        f"`make bench` on {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, float32, "
        "SmolLM2-135M-Instruct; interleaved rounds, medians with ranges. Every system trains on the same rows, in batches "
        "of the same size, with its own trainer (adapters' shuffles them). No GPU was used: `benchmarks/gpu.py` is for real sizes and has not been run. The floor is the frozen "
        "model's forward and the backward of its activations over the batch as padded, logits where something is learned.",
        "", *bars(kept),
    ]  # fmt: skip
    for name in (name for name in SETTINGS if name in kept):
        lines += table_of(kept[name])[1]
        lines += {"b": work_of_b, "c": work_of_c}[name](kept[name]) if name in ("b", "c") else []
    if "reuse-floor" in kept:
        ratios = kept["reuse-floor"]["ratios"]
        lines += [
            f"Cached step of (a) against its own floor (the same tails through the same blocks, prefix given, no edit): "
            f"median {median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f} over {len(ratios)} steps.", "",
        ]  # fmt: skip
    if "generation" in kept:
        lines += [
            "## Generation",
            "",
            "`python -m benchmarks.generation`: CPU time edited / base, pairs of 64-token runs.",
            "",
        ]
        lines += ["| adapter | median | smallest | largest | edits run in a generation |", "|---|---|---|---|---|"]
        for title, ratios, calls in kept["generation"]["adapters"]:
            lines.append(f"| {title} | {median(ratios):.3f} | {min(ratios):.3f} | {max(ratios):.3f} | {calls} |")
        lines.append("")
    if "curves" in kept:
        lines += ["## Curves", ""]
        pictures = sorted(path.name for path in (HERE / "pictures").glob("step_*.png"))
        lines += [f"![{name}](pictures/{name})" for name in pictures]
        lines += ["", "```json", json.dumps(kept["curves"], indent=1), "```"]
    return lines


def work_of_b(found: dict[str, Any]) -> list[str]:
    """What bounds (b): its completions are long."""
    runs = {system: columns(results) for system, results in found["results"].items()}
    if "floor" not in runs:
        return []
    # A tail token runs the 21 of 30 blocks above the edit and the head; the floor runs all blocks, and the head there too.
    head, block, learned = 28.3, 3.54, found["learned"]
    ours = learned * (21 * block + head)
    floor = found["padded"] * 30 * block + learned * head
    return [
        f"The work of (b): {learned} of the {found['tokens']} tokens are learned, and each must run through the 21 blocks "
        f"above the edit and the head, forward and backward, in every step: {ours / floor:.2f} of the floor's products "
        f"({block} million weights a block, {head} million in the head). Measured: "
        f"{runs['reftune']['later'][0] / runs['floor']['later'][0]:.2f}; tails are short, so their products are small ones "
        f"and their attention to the prefix weighs more. A bar of 4 asks for {1 / 4:.2f} of a peer at the floor.", "",
    ]  # fmt: skip


def work_of_c(found: dict[str, Any]) -> list[str]:
    """Why (c) is not as fast as (a): what must be computed."""
    runs = {system: columns(results) for system, results in found["results"].items()}
    if not {"floor", "pyreft"} <= set(runs):
        return []
    ours, peer = (runs[system]["later"][0] / runs["floor"]["later"][0] for system in ("reftune", "pyreft"))
    return [
        f"The work of (c): an edit of the first tokens at every layer leaves constant only the first block and, within a "
        f"step, the beginning that all rows share. All systems therefore run every row's own tokens through 29 blocks, "
        f"forward and backward. Of {found['padded']} padded tokens a pass, {found['tokens']} are tokens; reftune runs those "
        f"alone and the shared ones once a batch, in smaller matrix products, and comes to {ours:.2f} of the floor. pyreft "
        f"is at {peer:.2f} of it, so that twice its speed would be {peer / 2:.2f}: to get there the groups would have to "
        "attend without padding in one large matrix product (packed rows with an attention over blocks of rows), or the "
        "shared beginning be longer.", "",
    ]  # fmt: skip


def bars(kept: dict[str, Any]) -> list[str]:
    """What was promised, and whether it was seen."""
    rows = []

    def against(name: str, system: str, later: float, three: float) -> None:
        if name not in kept or system not in kept[name]["results"]:
            return
        ours, theirs = (columns(kept[name]["results"][which]) for which in ("reftune", system))
        for epochs, bar in (("later", later), ("three", three)):
            ratio = theirs[epochs][0] / ours[epochs][0]
            rows.append(
                (
                    f"({name}) {epochs} epochs against {SYSTEMS[system]}",
                    f"at least {bar:g}",
                    f"{ratio:.2f}",
                    ratio >= bar,
                )
            )

    for system in ("pyreft", "lora"):
        against("a", system, 12, 5)
        against("b", system, 4, 3)
        against("c", system, 2, 2)
    against("c", "lora-supervised", 1, 1)
    if "c" in kept:
        runs = {system: columns(found) for system, found in kept["c"]["results"].items()}
        if "pyreft" in runs:
            share = runs["reftune"]["memory"][0] / runs["pyreft"]["memory"][0]
            rows.append(("(c) peak memory against pyreft", "at most 0.6", f"{share:.2f}", share <= 0.6))
        for floor in ("floor", "floor-grouped"):
            if floor in runs:
                share = runs["reftune-plain"]["later"][0] / runs[floor]["later"][0]
                rows.append((f"(c) plain path against {SYSTEMS[floor]}", "at most 1.1", f"{share:.2f}", share <= 1.1))
    if "reuse-floor" in kept:
        share = median(kept["reuse-floor"]["ratios"])
        rows.append(("(a) cached step against its floor", "at most 1.25", f"{share:.2f}", share <= 1.25))
    if "curves" in kept:
        cached = kept["curves"]["lengths"]["prefix reuse, cached"]
        growth = cached["1024"] / cached["64"]
        rows.append(("cached step, prompt 64 to 1024", "below 1.5", f"{growth:.2f}", growth < 1.5))
    if not rows:
        return []
    lines = ["| bar | | seen | |", "|---|---|---|---|"]
    return [
        *lines,
        *(f"| {what} | {bar} | {seen} | {'met' if met else '**not met**'} |" for what, bar, seen, met in rows),
        "",
    ]


PARTS = (*SETTINGS, "reuse-floor", "generation", "curves")


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--parts", default=",".join(PARTS), help="what to measure; empty: only write the document again"
    )
    parser.add_argument("--rows", type=int, default=24, help="examples of each data set")
    parser.add_argument("--rounds", type=int, default=2, help="times that every system is run, interleaved")
    parser.add_argument("--without-peers", action="store_true", help="leave pyreft and adapters out")
    parser.add_argument("--output", type=Path, default=Path("out/bench"), help="where figures are kept")
    arguments = parser.parse_args()
    console = Console(width=170)
    torch.set_num_threads(2)
    if not DATA.is_dir():
        raise SystemExit(f"{DATA} is not there: the speed table needs arc_easy, arithmetic and ojousama.csv")
    systems = [s for s in SYSTEMS if not (arguments.without_peers and s in ("pyreft", "adapters"))]
    arguments.output.mkdir(parents=True, exist_ok=True)
    for part in filter(None, arguments.parts.split(",")):
        if part in SETTINGS:
            found = measure_setting(part, arguments.rows, arguments.rounds, systems, console.print)
            console.print(table_of(found)[0])
        elif part == "reuse-floor":
            found = measure_reuse_floor(arguments.rows)
        elif part == "generation":
            found = {"adapters": generation.main()}
        else:
            found = curves.draw(HERE / "pictures")
        write_text(arguments.output / f"{part}.json", json.dumps(found, indent=1) + "\n")
    write_text(HERE / "RESULTS.md", "\n".join(document(arguments.output)) + "\n")


if __name__ == "__main__":
    main()
