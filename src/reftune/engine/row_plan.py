"""Which rows of a flat batch are edited: integer arithmetic on four numbers a request, no tensors.

An inference engine lays the tokens of its requests one after another. What it knows of each is its adapter, the tokens
already computed, the tokens scheduled now, and the prompt's length. That is enough::

    ranges = edited_ranges(parse_positions("l1+generated"), prompt_length=9)     # once a request
    runs = edited_runs([Tokens(adapter, ranges, computed=4, scheduled=5), ...])  # once a step
    for start, stop, adapter, part in runs: ...                                  # rows start to stop - 1 of the batch

A step in which nothing is edited gives an empty list. Padding is a `Tokens` without ranges. A request whose answer is
computed again after a preemption keeps its prompt's length, so its answer is never mistaken for prompt.

A block of the key-value cache may be shared between requests exactly when every token up to its end saw the same edits:
`edits_inside` is what the key of a block has to name, beside the digest of the adapter's weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any, NamedTuple

from reftune.engine.position_grammar import Positions
from reftune.engine.positions import Part

ENDLESS = 1 << 62
"""The end of a range that goes on with the answer."""


class EditedRange(NamedTuple):
    """Ordinals ``start`` to ``stop - 1`` of a request, and the half of an untied pair that edits them."""

    start: int
    stop: int
    part: Part


class Tokens(NamedTuple):
    """A request's tokens in one forward.

    Attributes:
        adapter: whatever names the adapter to the caller: a slot, an object; handed on as it is.
        ranges: the request's edited ordinals (``edited_ranges``); empty for the base model and for padding.
        computed: tokens of the request that the cache holds already.
        scheduled: tokens of the request in this forward, one row each.
    """

    adapter: Any
    ranges: tuple[EditedRange, ...]
    computed: int
    scheduled: int


class Run(NamedTuple):
    """Rows ``start`` to ``stop - 1`` of the flat batch, edited by one adapter."""

    start: int
    stop: int
    adapter: Any
    part: Part


@lru_cache(maxsize=4096)
def edited_ranges(positions: Positions, prompt_length: int, untied: bool = False) -> tuple[EditedRange, ...]:
    """The edited ordinals of a request, as ranges in order: the integer form of ``Positions.ordinals``.

    Args:
        positions: of the adapter.
        prompt_length: tokens of the request's prompt.
        untied: whether prefix and suffix have an edit each; otherwise every part is ``"both"``, and ranges that adjoin
            are one.
    """
    n = prompt_length
    prefix = n if positions.prompt else min(positions.prefix, n // 2 if positions.has_two_ends else n)
    suffix = 0 if positions.prompt else min(positions.suffix, n - prefix)
    halves: list[tuple[int, int, Part]] = [(0, prefix, "prefix"), (n - suffix, n, "suffix")]
    if positions.generated:
        halves.append((n, ENDLESS, "suffix"))
    ranges: list[EditedRange] = []
    for start, stop, half in halves:
        part: Part = half if untied else "both"
        if start == stop:
            continue
        if ranges and ranges[-1].stop == start and ranges[-1].part == part:
            start = ranges.pop().start
        ranges.append(EditedRange(start, stop, part))
    return tuple(ranges)


def edited_runs(batch: Iterable[Tokens], row: int = 0) -> list[Run]:
    """The edited rows of a flat batch, in order.

    Args:
        batch: the requests in the order of their rows.
        row: of the first of their tokens.
    """
    runs: list[Run] = []
    for adapter, ranges, computed, scheduled in batch:
        end = computed + scheduled
        for start, stop, part in ranges:
            if start < end and stop > computed:
                runs.append(Run(row + max(start - computed, 0), row + min(stop, end) - computed, adapter, part))
        row += scheduled
    return runs


def row_slots(runs: Iterable[Run], rows: int, slot_of: Callable[[Run], int]) -> list[int]:
    """The slot of every row of a flat batch, 0 where nothing is edited (the form that a captured graph reads).

    Args:
        runs: the edited rows.
        rows: of the batch, padding included.
        slot_of: the slot that edits a run.
    """
    slots = [0] * rows
    for run in runs:
        slots[run.start : run.stop] = [slot_of(run)] * (run.stop - run.start)
    return slots


def edits_inside(ranges: Iterable[EditedRange], start: int, stop: int) -> tuple[EditedRange, ...]:
    """The edited ordinals among ``start`` to ``stop - 1``, counted from ``start``: what a cache block's key names."""
    return tuple(
        EditedRange(max(a, start) - start, min(b, stop) - start, part)
        for a, b, part in ranges
        if a < stop and b > start
    )
