"""What a sweep leaves to read: a table, two pictures, and a page."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reftune.output.documents import rendered
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


def ranked_table(records: Sequence[TrialRecord], names: Sequence[str], count: int) -> tuple[list[str], list[list[str]]]:
    """The heading and the rows of the best trials' table, lowest loss first."""
    ranked = sorted((r for r in records if r.state == "complete"), key=lambda r: r.value or 0)
    rows = [
        [str(r.number), f"{r.value:.4f}", *(value_text(r.settings[name]) for name in names),
         f"{r.facts.get('trainable_parameters', 0):,}", f"{r.seconds or 0:.1f}"]
        for r in ranked[:count]
    ]  # fmt: skip
    return ["trial", "held-out loss", *names, "parameters", "seconds"], rows


def _page(
    sweep: SweepRecipe, records: Sequence[TrialRecord], best: TrialRecord | None, importance: Mapping[str, float]
) -> str:
    states = {state: sum(r.state == state for r in records) for state in ("complete", "pruned", "failed")}
    header, ranked = ranked_table(records, list(sweep.space), _SHOWN)
    hits, misses = (sum(r.facts.get(name, 0) for r in records) for name in ("prefix_hits", "prefix_misses"))
    content: dict[str, Any] = {
        "base": sweep.base,
        "count": len(records),
        "states": ", ".join(f"{count} {state}" for state, count in states.items() if count),
        "seconds": sum(record.seconds or 0 for record in records),
        "best": best,
        "best_settings": [(name, value_text(value)) for name, value in best.settings.items()] if best else [],
        "header": header,
        "ranked": ranked,
        "shares": [(name, f"{share:.0%}") for name, share in importance.items()],
        "hits": hits,
        "looked_up": hits + misses,
    }
    return rendered("reftune.sweeps", PAGE_FILE, content)
