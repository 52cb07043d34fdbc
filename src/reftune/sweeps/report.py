"""What a sweep leaves to read: a table, two pictures, and a page."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from reftune.output.files import write_text
from reftune.sweeps.pictures import plot_history, plot_importance
from reftune.sweeps.recipe import SweepRecipe
from reftune.sweeps.records import TrialRecord
from reftune.sweeps.space import Label

TABLE_FILE, PAGE_FILE, IMPORTANCE_FILE = "trials.csv", "SWEEP.md", "importance.json"
HISTORY_PICTURE, IMPORTANCE_PICTURE = "history.png", "importance.png"
_SHOWN = 10


def value_text(value: Label) -> str:
    """A setting as a reader writes it."""
    return f"{value:.3g}" if isinstance(value, float) else "none" if value is None else str(value)


def settings_text(settings: Mapping[str, Label]) -> str:
    """`rank=4 layers=8`."""
    return " ".join(f"{name}={value_text(value)}" for name, value in settings.items())


def write_table(records: Sequence[TrialRecord], folder: Path) -> None:
    """Write `trials.csv`: a row a trial, full precision."""
    names = list(dict.fromkeys(name for record in records for name in record.settings))
    facts = ["trainable_parameters", "prefix_reuse", "prefix_hits", "prefix_misses"]
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["trial", "state", "eval_loss", "epochs", "seconds", *names, *facts, "note"])
    for r in records:
        values = [r.settings.get(name) for name in names]
        row = [r.number, r.state, r.value, len(r.epochs), r.seconds, *values, *(r.facts.get(f) for f in facts), r.note]
        table.writerow(["" if cell is None else cell for cell in row])
    write_text(folder / TABLE_FILE, text.getvalue())


def write_report(
    sweep: SweepRecipe,
    folder: Path,
    records: Sequence[TrialRecord],
    best: TrialRecord | None,
    importance: Mapping[str, float],
) -> None:
    """Write the pictures, `importance.json` and `SWEEP.md`."""
    plot_history(records, folder / HISTORY_PICTURE)
    complete = sum(record.state == "complete" for record in records)
    shares = {"method": "fANOVA", "of": sweep.options.metric, "trials": complete, "importance": dict(importance)}
    write_text(folder / IMPORTANCE_FILE, json.dumps(shares, indent=2) + "\n")
    if importance:
        plot_importance(importance, folder / IMPORTANCE_PICTURE)
    else:
        (folder / IMPORTANCE_PICTURE).unlink(missing_ok=True)
    write_text(folder / PAGE_FILE, _page(sweep, records, best, importance))


def _page(
    sweep: SweepRecipe, records: Sequence[TrialRecord], best: TrialRecord | None, importance: Mapping[str, float]
) -> str:
    states = {state: sum(r.state == state for r in records) for state in ("complete", "pruned", "failed")}
    seconds = sum(record.seconds or 0 for record in records)
    lines = [
        "# Sweep",
        "",
        f"{sweep.base.model}, {sweep.base.train_file}, seed {sweep.base.seed}. {len(records)} trials: ",
    ]
    lines[-1] += ", ".join(f"{count} {state}" for state, count in states.items() if count) + f"; {seconds:.0f} s."
    if best is not None and best.value is not None:
        lines += [
            "", "## Best", "",
            f"Trial {best.number}: held-out loss **{best.value:.4f}** nats per completion token.", "",
            *(f"- {name}: {value_text(value)}" for name, value in best.settings.items()), "",
            "Its adapter is in `best/`; `best.yaml` trains it again:", "",
            "```bash", "reftune chat best", "reftune train best.yaml", "```", "",
            "The held-out rows chose this trial, so its loss on them flatters it, the more so the fewer they are. "
            "One seed was trained per setting: what differs by less than the spread between seeds is not better. "
            "`reftune compare` trains the favourites with several seeds.",
        ]  # fmt: skip
    ranked = sorted((r for r in records if r.state == "complete"), key=lambda r: r.value or 0)
    names = list(sweep.space)
    lines += ["", f"## Trials: the best {min(_SHOWN, len(ranked))}", ""]
    lines += [f"| trial | held-out loss | {' | '.join(names)} | parameters | seconds |"]
    lines += ["|" + " ---: |" * (len(names) + 4)]
    for r in ranked[:_SHOWN]:
        cells = [str(r.number), f"{r.value:.4f}", *(value_text(r.settings[name]) for name in names)]
        lines += [f"| {' | '.join(cells)} | {r.facts.get('trainable_parameters', 0):,} | {r.seconds or 0:.1f} |"]
    lines += ["", f"All of them, with full precision: `{TABLE_FILE}`.", "", f"![Loss by trial]({HISTORY_PICTURE})"]
    lines += ["", "## What matters", ""]
    if importance:
        lines += [
            "Share of each setting in how much the loss of complete trials differs (fANOVA: an estimate by a random "
            "forest, rough below some twenty trials).", "", "| setting | share |", "| --- | ---: |",
            *(f"| {name} | {share:.0%} |" for name, share in importance.items()), "",
            f"![Importance]({IMPORTANCE_PICTURE})",
        ]  # fmt: skip
    else:
        lines += ["Too few complete trials to tell (at least 4 with different losses)."]
    hits, misses = (sum(r.facts.get(name, 0) for r in records) for name in ("prefix_hits", "prefix_misses"))
    if hits + misses:
        lines += [
            "",
            f"Prefix reuse: {hits:,} of {hits + misses:,} look-ups found what an epoch or a trial had stored.",
        ]
    return "\n".join(lines) + "\n"
