"""A sweep's pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.ticker import MaxNLocator

from reftune.output.pictures import new_figure, save_figure
from reftune.sweeps.records import TrialRecord

_DONE, _BEST, _PRUNED = "#8aa4c8", "#c2410c", "#9ca3af"


def plot_history(records: Sequence[TrialRecord], path: Path) -> None:
    """Draw each trial's held-out loss and the best so far. **Replaces the file**."""
    figure, axes = new_figure((7, 4.0), grid=True)
    complete = [(r.number, r.value) for r in records if r.state == "complete" and r.value is not None]
    pruned = [(r.number, r.value) for r in records if r.state == "pruned" and r.value is not None]
    if pruned:
        axes.scatter(*zip(*pruned, strict=True), color=_PRUNED, marker="x", s=28, label="stopped early")
    if complete:
        axes.scatter(*zip(*complete, strict=True), color=_DONE, s=28, label="trial")
        numbers, values = zip(*complete, strict=True)
        so_far = [min(values[: index + 1]) for index in range(len(values))]
        axes.step(numbers, so_far, where="post", color=_BEST, linewidth=1.8, label="best so far")
    axes.set_xlabel("trial")
    axes.set_ylabel("held-out loss (nats per completion token)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if complete or pruned:
        axes.legend(frameon=False)
    save_figure(figure, path)


def plot_importance(importance: Mapping[str, float], path: Path) -> None:
    """Draw each setting's share. **Replaces the file**."""
    figure, axes = new_figure((7, 1.2 + 0.45 * len(importance)))
    axes.spines[["top", "right"]].set_visible(False)
    names, shares = zip(*reversed(list(importance.items())), strict=True)
    bars = axes.barh(names, shares, color=_DONE)
    axes.bar_label(bars, labels=[f"{share:.0%}" for share in shares], padding=4, fontsize=9)
    axes.set_xlim(0, max(shares) * 1.15)
    axes.set_xlabel("share in how much the held-out loss differs (fANOVA)")
    save_figure(figure, path)
