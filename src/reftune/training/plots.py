"""The loss curve as a picture."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.ticker import MaxNLocator

from reftune.output.pictures import new_figure, save_figure

_TRAIN, _EVAL = "#8aa4c8", "#c2410c"


def plot_loss(
    log_history: Sequence[Mapping[str, Any]],
    path: str | os.PathLike[str],
    unit: str = "loss (nats per completion token)",
    name: str = "loss",
) -> None:
    """Draw training and evaluation loss by optimiser step into a PNG. **Replaces the file**, all at once or not at all.

    Args:
        log_history: ``trainer.state.log_history``: entries with ``step`` and ``loss`` or ``eval_loss``.
        path: the PNG; its folder is made.
        unit: what stands at the vertical axis.
        name: what is drawn, of training and (with ``eval_``) of evaluation: ``loss``, or ``reward``.
    """
    train, evaluation = _points(log_history, name), _points(log_history, f"eval_{name}")
    figure, axes = new_figure((7, 4), grid=True)
    if train:
        axes.plot(
            *zip(*train, strict=True), color=_TRAIN, linewidth=1.8, marker=_marker(train), markersize=3, label="train"
        )
    if evaluation:
        axes.plot(*zip(*evaluation, strict=True), color=_EVAL, linewidth=1.8, marker="o", markersize=4, label="eval")
        step, best = (min if name == "loss" else max)(evaluation, key=lambda point: point[1])
        axes.annotate(
            f"{best:.3f}", (step, best), xytext=(0, 8), textcoords="offset points", ha="center", fontsize=8, color=_EVAL
        )
    axes.set_xlabel("optimiser step")
    axes.set_ylabel(unit)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if name == "loss" and min([0.0, *(value for _, value in [*train, *evaluation])]) >= 0:
        axes.set_ylim(bottom=0)
    if train or evaluation:
        axes.legend(frameon=False)
    else:
        axes.text(0.5, 0.5, f"no {name} was logged", ha="center", va="center", transform=axes.transAxes)
    save_figure(figure, Path(path))


def _points(log_history: Sequence[Mapping[str, Any]], name: str) -> list[tuple[int, float]]:
    """(step, value) of the entries that have a finite one; of a step logged twice, the later."""
    found = {int(entry["step"]): float(entry[name]) for entry in log_history if name in entry and "step" in entry}
    return sorted((step, value) for step, value in found.items() if math.isfinite(value))


def _marker(points: Sequence[tuple[int, float]]) -> str:
    return "o" if len(points) <= 40 else ""
