"""What many users cost and gain: CPU seconds of training them together, and what an edit of one's own is good for.

::

    python -m benchmarks.many_users cost [--users 32] [--alone 6] [--processes 2] [--longer 1]
    python -m benchmarks.many_users evidence [--seeds 1] [--rate-users 5] [--lora-users 8]

``cost``: users of 20 rows, DiReFT r1 of all layers at l1+generated, batch 2, two epochs. The cohort is measured whole; of
trainings one after the other (in one process, prefix reuse on) and of `reftune train` processes a few are measured, and
scaled; ``--longer 5``: with answers five times as long. ``evidence``: forty users with a habit each (`styles.py`), 12
rows to train on, 4 that choose the rates, 4 held out. Rates are chosen on some of the users with the first seed. Every
figure is kept in a file as soon as it is there, and a run that is begun again goes on from it. Both print Markdown;
``evidence`` draws docs/images/many-users.png.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

from peft import get_peft_model

from benchmarks.many_users import evidence
from benchmarks.many_users.evidence import KINDS, LORA, OWN, RATES, Figures, drawn, encoded, figures, loaded
from benchmarks.many_users.styles import HABITS, rows_of
from reftune.runs.recipe import TrainRecipe
from reftune.runs.steps import training_arguments
from reftune.training.trainer import ReftTrainer
from reftune.users.run import run_users

COST = {
    "method": "direft",
    "rank": 1,
    "positions": "l1+generated",
    "lr": 1e-3,
    "epochs": 2,
    "batch_size": 2,
    "device": "cpu",
}
PICTURE = Path(__file__).resolve().parents[2] / "docs" / "images" / "many-users.png"


def children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def cost(users: int, alone: int, processes: int, longer: int, folder: Path) -> None:
    """Print CPU seconds of each way to train."""
    rows = {f"user-{number:02}": rows_of(HABITS[number % len(HABITS)], number, 20)["train"] for number in range(users)}
    for row in (row for own in rows.values() for row in own):
        row["completion"] = " ".join([row["completion"]] * longer)
    file = folder / "all.jsonl"
    file.write_text("".join(json.dumps({"user": user, **row}) + "\n" for user, own in rows.items() for row in own))
    loaded()
    begun = time.process_time()
    run_users(TrainRecipe(train_file=str(file), adapter_column="user", output=str(folder / "store"), **COST))
    together = time.process_time() - begun
    taken = []
    for user in list(rows)[:alone]:
        recipe = TrainRecipe(train_file=str(file), output=str(folder / user), tensorboard=False, **COST)
        tokens, begun = encoded(rows[user]), time.process_time()
        model = get_peft_model(loaded()[0], recipe.adapter_config())
        args = training_arguments(recipe, folder / user, len(tokens), False, save_strategy="no", disable_tqdm=True)
        ReftTrainer(model=model, args=args, train_dataset=tokens, processing_class=loaded()[1]).train()
        taken.append(time.process_time() - begun)
        model.unload()
    before = children()
    for user in list(rows)[:processes]:
        own = folder / f"{user}.jsonl"
        own.write_text("".join(json.dumps(row) + "\n" for row in rows[user]))
        flags = [part for name, value in COST.items() for part in (f"--{name.replace('_', '-')}", str(value))]
        command = [
            "-c",
            "from reftune_command import main; main()",
            "train",
            "--train-file",
            str(own),
            "--no-tensorboard",
        ]
        subprocess.run([sys.executable, *command, "--output", str(folder / f"alone-{user}"), *flags], check=True)
    separate = (children() - before) / processes * users
    one_by_one = mean(taken) * users
    print(f"\n| {users} users x 20 rows | CPU s | times the cohort | measured |\n|---|---:|---:|---|")
    for name, seconds, what in (
        ("one cohort after another (`--adapter-column`)", together, "all, with loading the base"),
        (
            "one after the other, one process",
            one_by_one,
            f"{alone} users ({min(taken):.1f} to {max(taken):.1f} s), scaled",
        ),
        ("a `reftune train` each", separate, f"{processes} users, scaled"),
    ):
        print(f"| {name} | {seconds:.0f} | {seconds / together:.2f} | {what} |")


def gather(
    seeds: int, rate_users: int, lora_users: int, folder: Path
) -> tuple[dict[str, Any], dict[str, list[Figures]]]:
    """Choose the rates and measure all methods, going on from what the folder holds."""
    kept = folder / "figures.json"
    known: dict[str, Any] = json.loads(kept.read_text()) if kept.is_file() else {}

    def found(key: str, *arguments: Any) -> Figures:
        if key not in known:
            known[key] = asdict(figures(*arguments[:-1], folder / f"{len(known)}", arguments[-1]))
            kept.write_text(json.dumps(known, indent=1))
            print(key, known[key], flush=True)
        return Figures(**known[key])

    chosen: dict[str, Any] = {}
    for kind, choices in RATES.items():
        few = drawn(0, every=max(1, len(HABITS) // (rate_users if kind != LORA else max(1, rate_users // 2))))
        tried = [found(f"{kind} {rates} validation", kind, rates, few, "validation", 0, False) for rates in choices]
        chosen[kind] = min(zip(choices, tried, strict=True), key=lambda pair: pair[1].loss)[0]
    results: dict[str, list[Figures]] = {}
    for seed in range(seeds):
        few = drawn(seed, every=len(HABITS) // lora_users)
        for kind, rows in (*((kind, drawn(seed)) for kind in ("base", *KINDS)), (OWN, few), (LORA, few)):
            rates, some = chosen.get(kind, {}), rows is few
            name = f"{kind} ({lora_users} users)" if some else kind
            key = f"{name if kind == OWN else kind} {rates} held out, seed {seed}"
            results.setdefault(name, []).append(found(key, kind, rates, rows, "held_out", seed, True))
    return chosen, results


def table(chosen: dict[str, Any], results: dict[str, list[Figures]]) -> str:
    lines = [
        "| | rates | held-out loss | answers with the habit | CPU s a user | bytes a user |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for kind, runs in results.items():
        own = chosen.get(kind.partition(" (")[0], {})
        rates = ", ".join(f"{name} {value:g}" for name, value in own.items()) or "none"
        parts = [spread([run.loss for run in runs], "{:.2f}"), spread([100 * run.habit for run in runs], "{:.0f} %")]
        lines.append(
            f"| {kind} | {rates} | {parts[0]} | {parts[1]} | {mean(run.seconds for run in runs):.1f} | "
            f"{runs[0].bytes:,.0f} |"
        )
    return "\n".join(lines)


def spread(values: list[float], shown: str) -> str:
    middle = shown.format(mean(values))
    return middle if len(values) == 1 else f"{middle} ({shown.format(min(values))} to {shown.format(max(values))})"


def draw(results: dict[str, list[Figures]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, sides = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True, layout="constrained")
    names = list(results)[::-1]
    for side, what, label, scale in (
        (sides[0], "loss", "held-out loss, nats a token", 1),
        (sides[1], "habit", "answers with the user's habit, %", 100),
    ):
        values = [[scale * getattr(run, what) for run in results[name]] for name in names]
        bars = side.barh(
            names,
            [mean(some) for some in values],
            color=["#3b6ea5" if "own" in n or "each" in n else "#9aa5b1" for n in names],
        )
        for index, some in enumerate(values):
            side.plot(some, [index] * len(some), "k.", markersize=4)
        side.bar_label(bars, fmt="%.2f" if scale == 1 else "%.0f", padding=6, fontsize=9)
        side.set_xlabel(label)
        side.spines[["top", "right"]].set_visible(False)
        side.margins(x=0.15)
    figure.savefig(PICTURE, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["cost", "evidence"])
    parser.add_argument("--folder", type=Path, help="keeps figures and stores; default: a new one")
    for name, default in (
        ("users", 32), ("alone", 6), ("processes", 2), ("longer", 1), ("seeds", 1), ("rate-users", 5), ("lora-users", 8)
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--epochs", type=float, default=evidence.EPOCHS)
    given = parser.parse_args()
    evidence.EPOCHS = given.epochs
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    folder = given.folder or Path(tempfile.mkdtemp(prefix="many-users-"))
    folder.mkdir(parents=True, exist_ok=True)
    if given.part == "cost":
        cost(given.users, given.alone, given.processes, given.longer, folder)
        return
    chosen, results = gather(given.seeds, given.rate_users, given.lora_users, folder)
    print(table(chosen, results))
    draw(results)


if __name__ == "__main__":
    main()
