"""Pictures: heat maps by layer and position, and the graph of a causal model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import networkx as nx
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from reftune.causal.model import CausalModel

if TYPE_CHECKING:
    from reftune.causal.patching import HeatMap

_INK, _FAINT, _LIVE, _FIXED = "#1f2937", "#9ca3af", "#c2410c", "#fde7d9"


def plot_heat_map(heat_map: HeatMap, path: str | Path, title: str | None = None, lowest: float | None = None) -> None:
    """Draw a heat map, layers upwards as the computation goes; **replaces the file**.

    Args:
        heat_map: the values and names.
        path: a PNG; its folder is made.
        title: in place of the map's own.
        lowest: where the colours begin; None: at the least value (around zero where values have both signs).
    """
    values = heat_map.values.float().numpy()
    height, width = values.shape
    size = min(14.0, max(4.2, 2.6 + 0.62 * width)), min(7.5, max(2.4, 1.4 + 0.3 * height))
    figure, axes = _figure(size)
    greatest, least = float(values.max()), float(values.min())
    both = lowest is None and least < -0.05 * max(greatest, 1e-9)
    bound = max(abs(least), abs(greatest))
    limits = (-bound, bound) if both else (least if lowest is None else lowest, greatest)
    image = axes.imshow(
        values, aspect="auto", origin="lower", cmap="RdBu_r" if both else "viridis", vmin=limits[0], vmax=limits[1]
    )
    fits = max(map(len, heat_map.columns)) * 0.085 < (size[0] - 1.8) / width
    axes.set_xticks(range(width), heat_map.columns, rotation=0 if fits else 40)
    for label in axes.get_xticklabels() if not fits else []:
        label.set_ha("right")
        label.set_rotation_mode("anchor")
    axes.set_xlabel(heat_map.across)
    step = max(1, height // 12)
    axes.set_yticks(range(0, height, step), heat_map.rows[::step])
    axes.set_ylabel("layer")
    axes.set_title(heat_map.title if title is None else title, fontsize=10)
    if height * width <= 72:
        middle = sum(limits) / 2
        for row in range(height):
            for column in range(width):
                value = float(values[row, column])
                pale = abs(value) < 0.55 * bound if both else value > middle
                ink = _INK if pale else "white"
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=ink)
    figure.colorbar(image, ax=axes)
    _save(figure, path)


def plot_graph(
    model: CausalModel,
    path: str | Path,
    setting: Mapping[str, Any] | None = None,
    interventions: Mapping[str, Any] | None = None,
) -> None:
    """Draw a causal model, inputs below and outputs on top; **replaces the file**.

    Args:
        model: the causal model.
        path: a PNG; its folder is made.
        setting: values to write into the variables; where variables have lists of values, live edges are coloured.
        interventions: variables to mark as held at a value.
    """
    layers = list(nx.topological_generations(model.graph))
    widest = max(map(len, layers))
    figure, axes = _figure((min(14.0, max(4.0, 1.25 * widest)), 1.0 + 0.95 * len(layers)))
    order = {name: index for index, name in enumerate(model.order)}
    place: dict[str, tuple[float, float]] = {}
    for depth, layer in enumerate(layers):
        # Each variable stands above the middle of its parents, in the order that this gives.
        def middle(name: str) -> float:
            parents = [place[p][0] for p in model.variables[name].parents if p in place]
            return sum(parents) / len(parents) if parents else float(order[name])

        ordered = sorted(layer, key=middle)
        for index, name in enumerate(ordered):
            place[name] = ((index + 0.5) * widest / len(ordered), float(depth))
    live: set[tuple[str, str]] = set()
    if setting is not None and all(
        v.values is not None for v in model.variables.values() if model.graph.out_degree(v.name)
    ):  # pyright: ignore
        live = set(model.live_edges(setting))
    for parent, child in model.graph.edges:
        colour = _LIVE if (parent, child) in live else _FAINT
        arrow = {
            "arrowstyle": "-|>",
            "color": colour,
            "lw": 1.6 if colour == _LIVE else 1.0,
            "shrinkA": 16,
            "shrinkB": 19,
        }
        axes.annotate("", xy=place[child], xytext=place[parent], arrowprops=arrow)
    for name, (x, y) in place.items():
        text = name if setting is None else f"{name}\n{setting[name]}"
        held = interventions is not None and name in interventions
        box = {"boxstyle": "round,pad=0.35", "fc": _FIXED if held else "white", "ec": _INK, "lw": 1.0}
        axes.text(x, y, text, ha="center", va="center", fontsize=9, color=_INK, bbox=box)
    axes.set_xlim(-0.1, widest + 0.1)
    axes.set_ylim(-0.5, len(layers) - 0.5)
    axes.axis("off")
    _save(figure, path)


def plot_lines(lines: Mapping[str, Mapping[str, float]], path: str | Path, x: str, y: str) -> None:
    """Draw a line for each name, through its values by label; **replaces the file**."""
    figure, axes = _figure((6.4, 3.6))
    for (name, values), colour in zip(
        lines.items(), ("#c2410c", "#2563eb", "#15803d", "#7c3aed", "#6b7280"), strict=False
    ):
        axes.plot(
            list(values), list(values.values()), label=name, color=colour, marker="o", markersize=4, linewidth=1.8
        )
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(True, color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    _save(figure, path)


def _figure(size: tuple[float, float]) -> tuple[Figure, Any]:
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def _save(figure: Figure, path: str | Path) -> None:
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    try:
        figure.savefig(partial, format="png")
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
