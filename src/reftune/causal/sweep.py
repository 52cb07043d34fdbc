"""Many interventions on one base run, each by itself: batched, sources read once, layers below the site reused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from reftune.causal.interchange import Inputs, Intervention, Run, call, source_states
from reftune.causal.locations import Sites
from reftune.causal.reuse import Recording, batch_of, first_computed, picked_inputs
from reftune.causal.session import Bound, Session
from reftune.engine.sites import Stack, find_stacks

Metric = Callable[[Tensor], Tensor]
"""Takes the output of a batch, (batch, ...), logits as a rule, and gives a number for each row, (batch,)."""


def output_tensor(output: Any) -> Tensor:
    """A model's logits, or the tensor that it returns."""
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    return logits if logits is not None else output[0]


@torch.no_grad()
def sweep(
    model: nn.Module,
    base: Run | Inputs,
    cells: Sequence[Sequence[Intervention]],
    metric: Metric,
    rows: int = 64,
    reuse: bool = True,
) -> Float[Tensor, "cells batch"]:
    """Run the base once under each cell's interventions.

    All sources of all cells are read first, each distinct one in one run. Cells that begin at the same layer share
    forwards of up to ``rows`` rows, and those forwards begin at that layer.

    Args:
        model: in evaluation mode.
        base: the run that every cell changes.
        cells: the interventions of each cell, made on top of the base's own.
        metric: what is measured.
        rows: at most so many rows in one forward (a base of more rows runs alone).
        reuse: whether to begin where the cell differs from the base; otherwise at the embedding.

    Returns:
        The metric of each cell and row.
    """
    base = Run.of(base)
    batch = batch_of(base)
    sites = Sites(model)

    def bind(intervention: Intervention, sources: Sequence[Tensor], cell: int | None) -> Bound:
        return Bound(intervention.location, sites(intervention.location), intervention.action, sources, cell)

    flat = [intervention for cell in cells for intervention in cell]
    states = iter(source_states(model, [*base.interventions, *flat]))
    own = [(intervention, next(states)) for intervention in base.interventions]
    bound = [[bind(intervention, next(states), None) for intervention in cell] for cell in cells]
    groups = _group(bound, reuse)
    recording = _record(model, base, groups)

    result: list[Tensor | None] = [None] * len(cells)
    at_once = max(1, rows // batch)
    for (first, _), members in groups.items():
        for start in range(0, len(members), at_once):
            numbers = members[start : start + at_once]
            count = len(numbers)

            def tile(tensor: Tensor, count: int = count) -> Tensor:
                return tensor.repeat(count, *[1] * (tensor.ndim - 1))

            now: list[Bound] = []
            for intervention, sources in own:
                whole = bind(intervention, [tile(s) if s.shape[0] == batch else s for s in sources], None)
                if first_computed(whole.site) >= first or whole.site.stack is None:
                    now.append(whole)
            for place, number in enumerate(numbers):
                for each in bound[number]:
                    each.cell = place
                    now.append(each)
            with Session(model, now, cells=count), recording.resume(first, tile):
                output = output_tensor(call(model, picked_inputs(base, tile)))
            for number, part in zip(numbers, output.chunk(count), strict=True):
                result[number] = metric(part)
    return torch.stack([value for value in result if value is not None])


def _group(bound: Sequence[Sequence[Bound]], reuse: bool) -> dict[tuple[int, str], list[int]]:
    """Cells by the first block that they need computed, and its stack."""
    groups: dict[tuple[int, str], list[int]] = {}
    for number, cell in enumerate(bound):
        stacks = {each.site.stack.name if each.site.stack else None for each in cell}
        first = min(first_computed(each.site) for each in cell) if reuse and cell and len(stacks) == 1 else 0
        groups.setdefault((first, next(iter(stacks), None) or "" if first else ""), []).append(number)
    # One recording serves one stack: cells of another one (an encoder beside a decoder) are computed in full.
    stacks = [name for first, name in groups if first]
    if len(set(stacks)) <= 1:
        return groups
    merged: dict[tuple[int, str], list[int]] = {}
    for (first, name), members in groups.items():
        merged.setdefault((first, name) if name == stacks[0] or not first else (0, ""), []).extend(members)
    return merged


def _record(model: nn.Module, base: Run, groups: dict[tuple[int, str], list[int]]) -> Recording:
    needed = [(first, name) for first, name in groups if first]
    stacks = {stack.name: stack for stack in find_stacks(model)} if needed else {}
    stack = stacks[needed[0][1]] if needed else Stack("", "", "", ())
    return Recording(model, base, stack, [first - 1 for first, _ in needed])
