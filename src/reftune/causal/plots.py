"""Pictures: heat maps by layer and position, and the graph of a causal model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import networkx as nx

from reftune.causal.model import CausalModel
from reftune.output.pictures import new_figure, save_figure

_INK, _FAINT, _LIVE, _FIXED = "#1f2937", "#9ca3af", "#c2410c", "#fde7d9"


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
    figure, axes = new_figure((min(14.0, max(4.0, 1.25 * widest)), 1.0 + 0.95 * len(layers)))
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
    save_figure(figure, path)


def plot_lines(lines: Mapping[str, Mapping[str, float]], path: str | Path, x: str, y: str) -> None:
    """Draw a line for each name, through its values by label; **replaces the file**."""
    figure, axes = new_figure((6.4, 3.6), grid=True)
    for (name, values), colour in zip(
        lines.items(), ("#c2410c", "#2563eb", "#15803d", "#7c3aed", "#6b7280"), strict=False
    ):
        axes.plot(
            list(values), list(values.values()), label=name, color=colour, marker="o", markersize=4, linewidth=1.8
        )
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.legend(frameon=False)
    save_figure(figure, path)
