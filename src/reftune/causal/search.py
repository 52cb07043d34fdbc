"""Where does a variable live? Alignments for every layer and position, a layer's positions trained side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from reftune.causal.accuracy import InterchangeAccuracy, interchange_accuracies
from reftune.causal.aligned import Aligned
from reftune.causal.alignment import Alignment
from reftune.causal.heat_map import HeatMap
from reftune.causal.interchange import Run, read
from reftune.causal.interchange_data import InterchangeData
from reftune.causal.locations import Indices, Location, layers_of
from reftune.causal.training import DEFAULT, AlignOptions, align_cells
from reftune.engine.sites import Layers
from reftune.errors import ReftuneError


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        heat_map: IIA by layer and position.
        accuracies: with every variable's part, by (layer, column).
        aligned: the trained alignments, by (layer, column).
    """

    heat_map: HeatMap
    accuracies: dict[tuple[int, str], InterchangeAccuracy]
    aligned: dict[tuple[int, str], Aligned]

    def best(self) -> tuple[Aligned, InterchangeAccuracy]:
        """The alignment with the greatest IIA."""
        key = max(self.accuracies, key=lambda k: self.accuracies[k].overall)
        return self.aligned[key], self.accuracies[key]


def search(
    model: nn.Module,
    make: Callable[[int], Alignment],
    train: InterchangeData,
    test: InterchangeData,
    *,
    component: str = "block_output",
    layers: Layers = "all",
    positions: Sequence[Indices] = (None,),
    labels: Sequence[str] | None = None,
    options: AlignOptions = DEFAULT,
    choices: Sequence[int] | None = None,
    at_once: int = 8,
) -> SearchResult:
    """Train an alignment at every layer and position, and measure it on other examples.

    Args:
        model: the network, in evaluation mode.
        make: builds a fresh alignment of a given width.
        train: interchanges to learn from.
        test: others, to measure by.
        component: where in a layer; a module path with ``{layer}`` as well.
        layers: the rows of the map.
        positions: the columns of the map.
        labels: their names.
        options: how alignments are trained.
        choices: output classes (token ids) among which labels choose; None: all.
        at_once: so many positions of a layer share forwards.

    Returns:
        The heat map of IIA, the alignments, and every variable's accuracy.
    """
    names = [str(p) for p in positions] if labels is None else list(labels)
    if len(names) != len(positions) or not positions:
        raise ReftuneError(f"{len(names)} labels for {len(positions)} positions")
    accuracies: dict[tuple[int, str], InterchangeAccuracy] = {}
    found: dict[tuple[int, str], Aligned] = {}
    numbers: list[int] = []
    one_row = Run(train.select(torch.tensor([0])).base)
    for number in layers_of(model, component, layers):
        layer = 0 if number is None else number
        numbers.append(layer)
        with torch.no_grad():
            width = read(model, one_row, Location(component, number))[0].shape[-1]
        cells = [[Aligned(Location(component, number, p), make(width))] for p in positions]
        for start in range(0, len(cells), at_once):
            part = cells[start : start + at_once]
            align_cells(model, part, train, options, choices)
            measured = interchange_accuracies(model, part, test, choices)
            for name, cell, accuracy in zip(names[start : start + at_once], part, measured, strict=True):
                accuracies[layer, name], found[layer, name] = accuracy, cell[0]
    values = torch.tensor([[accuracies[layer, name].overall for name in names] for layer in numbers])
    heat_map = HeatMap.of(values[..., None], numbers, names, "interchange intervention accuracy")
    return SearchResult(heat_map, accuracies, found)
