"""How every picture begins and ends: a figure without a display, and a PNG replaced whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from reftune.output.files import replaced


def new_figure(size: tuple[int | float, int | float], grid: bool = False, panels: int = 1) -> tuple[Figure, Any]:
    """A figure of ``size`` inches and its axes, whose marks lie above the grid and which has no frame on two sides.

    Of several panels, side by side, the axes are a list.
    """
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    found = list(figure.subplots(1, panels, squeeze=False)[0])
    for axes in found:
        axes.set_axisbelow(True)
        if grid:
            axes.grid(True, color="#e5e7eb", linewidth=0.8)
            axes.spines[["top", "right"]].set_visible(False)
    return figure, found[0] if panels == 1 else found


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a PNG, whole or not at all; **makes its folder and replaces the file**."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with replaced(target) as partial:
        figure.savefig(partial, format="png")
