"""Batches of interchanges under alignments: sources and lower layers computed once, cells side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from reftune.causal.alignment import Alignment
from reftune.causal.interchange import Run, call, read
from reftune.causal.interchange_data import InterchangeData
from reftune.causal.locations import Location
from reftune.causal.reuse import Recording, first_computed, picked_inputs
from reftune.causal.session import Bound, Session
from reftune.causal.sweep import output_tensor
from reftune.engine.sites import Site, Stack
from reftune.errors import ReftuneError

_CHUNK = 64


@dataclass(frozen=True, eq=False)
class Aligned:
    """An alignment at a location."""

    location: Location
    alignment: Alignment


Cell = Sequence[Aligned]


class AlignedRuns:
    """The network's answers to a data set's interchanges, for one or several cells of alignments at a time.

    Args:
        model: in evaluation mode; its weights do not change.
        cells: each cell is a set of alignments that act together; cells know nothing of each other.
        data: the interchanges.
        choices: output classes to choose among (token ids); None: all.
    """

    def __init__(
        self, model: nn.Module, cells: Sequence[Cell], data: InterchangeData, choices: Sequence[int] | None = None
    ) -> None:
        self.model, self.cells, self.data = model, cells, data
        self.choices = None if choices is None else torch.tensor(choices)
        self._sites: list[list[Site]] = [[a.location.site(model) for a in cell] for cell in cells]
        for cell, sites in zip(cells, self._sites, strict=True):
            for aligned, site in zip(cell, sites, strict=True):
                self._check(aligned, site)
        self._sources = self._read_sources()
        self._first, self._recording = self._record()

    def logits(self, index: Tensor) -> Float[Tensor, "cells batch classes"]:
        """What the network answers to the examples at ``index``, under each cell's alignments."""
        count = len(self.cells)

        def pick(tensor: Tensor) -> Tensor:
            chosen = tensor[index.to(tensor.device)]
            return chosen.repeat(count, *[1] * (chosen.ndim - 1))

        bound = []
        for number, (cell, sites) in enumerate(zip(self.cells, self._sites, strict=True)):
            for place, (aligned, site) in enumerate(zip(cell, sites, strict=True)):
                states = self._sources[number][place][index]
                columns = [self.data.variables.index(name) for name in aligned.alignment.variables]
                active = self.data.active[index][:, columns].to(states)
                active = active[:, None].expand(-1, states.shape[1], -1)
                location = _rows_of(aligned.location, index)
                bound.append(Bound(location, site, aligned.alignment, [states, active], number))
        with Session(self.model, bound, cells=count), self._recording.resume(self._first, pick):
            output = output_tensor(call(self.model, picked_inputs(Run(self.data.base), pick)))
        if output.ndim == 3:
            output = output[:, -1]
        if self.choices is not None:
            output = output[:, self.choices.to(output.device)]
        return output.float().unflatten(0, (count, len(index)))

    def _check(self, aligned: Aligned, site: Site) -> None:
        alignment = aligned.alignment
        if missing := set(alignment.variables) - set(self.data.variables):
            raise ReftuneError(f"the data has no sources for {sorted(missing)}, which an alignment here is for")
        if site.width and site.width != alignment.width:
            raise ReftuneError(
                f"an alignment of width {alignment.width} does not fit {aligned.location.component!r} "
                f"of width {site.width}"
            )

    @torch.no_grad()
    def _read_sources(self) -> list[list[Tensor]]:
        """States (examples, n, variables, width) for every cell and alignment; each source batch runs once."""
        places = [(c, p) for c, cell in enumerate(self.cells) for p in range(len(cell))]
        pieces: dict[tuple[int, int], list[Tensor]] = {place: [] for place in places}
        for start in range(0, len(self.data), _CHUNK):
            index = torch.arange(start, min(start + _CHUNK, len(self.data)))
            part = self.data.select(index)
            locations = [_rows_of(self.cells[c][p].location, index) for c, p in places]
            by_variable = {name: read(self.model, Run(part.sources[name]), *locations) for name in self.data.variables}
            for number, (c, p) in enumerate(places):
                names = self.cells[c][p].alignment.variables
                pieces[c, p].append(torch.stack([by_variable[name][number] for name in names], 2))
        return [[torch.cat(pieces[c, p]) for p in range(len(cell))] for c, cell in enumerate(self.cells)]

    @torch.no_grad()
    def _record(self) -> tuple[int, Recording]:
        sites = [site for cell in self._sites for site in cell]
        base = Run(self.data.base)
        stacks = {site.stack for site in sites}
        stack = next(iter(stacks))
        first = min(map(first_computed, sites)) if len(stacks) == 1 and stack is not None else 0
        if stack is None or not first:
            return 0, Recording(self.model, base, Stack("", "", "", ()), [])
        return first, Recording.in_chunks(self.model, base, stack, first - 1, _CHUNK)


def _rows_of(location: Location, index: Tensor) -> Location:
    positions: Any = location.positions
    return location.at(positions[index]) if isinstance(positions, Tensor) and positions.ndim else location
