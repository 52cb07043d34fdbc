"""pyreft's ``unit_locations``, ``intervention_locations`` and ``subspaces``, and the masks that they stand for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from reftune.engine.position_grammar import Positions
from reftune.engine.position_grammar import parse_positions as read_positions
from reftune.errors import ReftuneError

NOWHERE = -1
"""Fills up short lists of locations: no token is meant. (pyreft fills up with a real token.)"""


def parse_positions(positions: str) -> tuple[int, int]:
    """The number of first and of last prompt tokens that ``"f7+l7"`` names.

    Raises:
        ReftuneError: the string does not parse, or names something else than first and last tokens.
    """
    found = read_positions(positions)
    if found.prompt or found.generated:
        raise ReftuneError(f"positions={positions!r}: pyreft's helpers take fN, lN or fA+lB.")
    return found.prefix, found.suffix


def get_intervention_locations(
    *,
    last_position: int,
    positions: str | None = None,
    first_n: int = 0,
    last_n: int = 0,
    num_interventions: int = 1,
    share_weights: bool = False,
    pad_mode: str = "first",
) -> list[list[int]]:
    """The tokens that each intervention edits, in pyreft's layout: one list an intervention, all of one length.

    Tied, every intervention gets prefix and suffix; untied, the first half of the interventions gets the prefix and the
    second half the suffix. Short lists are filled up with -1, which stands for no token.

    Args:
        last_position: number of prompt tokens (as in pyreft, where the name misleads).
        positions: ``"f7+l7"`` and the like, in place of ``first_n`` and ``last_n``.
        first_n: prompt tokens at the start.
        last_n: prompt tokens at the end.
        num_interventions: number of interventions.
        share_weights: tied or untied.
        pad_mode: accepted as pyreft does; there is no padding token to choose here.

    Raises:
        ReftuneError: nothing to edit, or an odd number of untied interventions with both a prefix and a suffix.
    """
    if positions is not None:
        first_n, last_n = parse_positions(positions)
    if first_n + last_n < 1 or last_position < 1:
        raise ReftuneError(
            f"first_n={first_n}, last_n={last_n}, last_position={last_position}: there is nothing to edit."
        )
    asked = Positions("", first_n, last_n)
    counts = asked.counts(torch.tensor(last_position))
    prefix = list(range(int(counts[0])))
    suffix = list(range(last_position - int(counts[1]), last_position))
    if share_weights or not asked.has_two_ends:
        return [_filled(prefix + suffix, first_n + last_n) for _ in range(num_interventions)]
    if num_interventions % 2:
        raise ReftuneError(
            f"num_interventions={num_interventions}: untied interventions come in pairs, one for the prefix and one "
            "for the suffix of each layer; list every layer twice, or use share_weights=True."
        )
    width, half = max(first_n, last_n), num_interventions // 2
    return [_filled(prefix, width) for _ in range(half)] + [_filled(suffix, width) for _ in range(half)]


def _filled(locations: list[int], width: int) -> list[int]:
    return locations + [NOWHERE] * (width - len(locations))


def location_masks(unit_locations: Any, names: Sequence[str], batch: int, length: int) -> dict[str, Tensor]:
    """The tokens that each intervention edits, as masks (batch, length) by name; no entry where it edits every token.

    Args:
        unit_locations: pyvene's: ``{"sources->base": (None, L)}`` or ``{"base": L}``, where L is a token's number for
            all, or for each intervention None or a list of rows of token numbers (one row serves the whole batch). Or a
            tensor ``intervention_locations``, (batch, interventions, positions). Negative numbers mean no token.
        names: names of the interventions.
        batch: rows.
        length: tokens of a row.

    Raises:
        ReftuneError: another shape, or a token that is not there.
    """
    if isinstance(unit_locations, Tensor):
        rows = unit_locations.transpose(0, 1).tolist()
    else:
        rows = _base_locations(unit_locations)
    if rows is None:
        return {}
    if isinstance(rows, int):
        rows = [[[rows]]] * len(names)
    if len(rows) != len(names):
        raise ReftuneError(f"unit_locations are for {len(rows)} interventions, and the model has {len(names)}.")
    return {name: _mask(one, batch, length) for name, one in zip(names, rows, strict=True) if one is not None}


def _base_locations(unit_locations: Any) -> Any:
    if isinstance(unit_locations, Mapping):
        if len(unit_locations) != 1 or not set(unit_locations) <= {"base", "sources->base"}:
            raise ReftuneError(
                f"unit_locations has the keys {sorted(unit_locations)}: ReFT has no source inputs, so give "
                "{'sources->base': (None, locations)} or {'base': locations}."
            )
        (unit_locations,) = unit_locations.values()
    return unit_locations[1] if isinstance(unit_locations, tuple) else unit_locations


def _mask(rows: Any, batch: int, length: int) -> Tensor:
    rows = [[rows]] if isinstance(rows, int) else [[row] if isinstance(row, int) else list(row) for row in rows]
    times = len(rows) // batch
    if times > 1 and len(rows) == times * batch and all(row == rows[i // times * times] for i, row in enumerate(rows)):
        rows = rows[::times]  # repeated for beams, as pyreft wants them; the engine spreads a row's over its beams
    if len(rows) not in (1, batch):
        raise ReftuneError(
            f"unit_locations have {len(rows)} rows for a batch of {batch}: give one each, or one for all."
        )
    mask = torch.zeros(batch, length, dtype=torch.bool)
    for index in range(batch):
        wanted = [int(place) for place in rows[index % len(rows)] if place >= 0]
        if wanted and max(wanted) >= length:
            raise ReftuneError(
                f"unit_locations name token {max(wanted)}, and row {index} has {length}, 0 to {length - 1}. Where a "
                "script adds the left padding to intervention_locations: ReftDataCollator has done that."
            )
        mask[index, wanted] = True
    return mask


def rows_by_intervention(subspaces: Any, names: Sequence[str]) -> list[Any]:
    """Subspaces as a list, one entry an intervention.

    Raises:
        ReftuneError: another number of them than of interventions.
    """
    rows = subspaces.transpose(0, 1).tolist() if isinstance(subspaces, Tensor) else list(subspaces)
    if len(rows) != len(names):
        raise ReftuneError(f"subspaces are for {len(rows)} interventions, and the model has {len(names)}.")
    return rows


def subspace_directions(
    subspaces: Any,
    names: Sequence[str],
    ranks: Sequence[int],
    partitions: Sequence[tuple[tuple[int, int], ...] | None],
    batch: int,
) -> dict[str, Tensor]:
    """The directions that act on each row, as masks (batch, r) by name.

    Args:
        subspaces: for each intervention None or a list of rows, each a list of directions or, with a partition, of its
            parts. Or a tensor (batch, interventions, directions). Negative numbers mean none.
        names: of the interventions.
        ranks: of the interventions.
        partitions: of the interventions.
        batch: rows.

    Raises:
        ReftuneError: another shape, or a direction that is not there.
    """
    if subspaces is None:
        return {}
    rows = rows_by_intervention(subspaces, names)
    found: dict[str, Tensor] = {}
    for name, rank, parts, own in zip(names, ranks, partitions, rows, strict=True):
        if own is None:
            continue
        if parts is None:
            found[name] = _mask(own, batch, rank)
        else:
            chosen = _mask(own, batch, len(parts))
            spread = torch.zeros(len(parts), rank, dtype=torch.bool)
            for number, (start, end) in enumerate(parts):
                spread[number, start:end] = True
            found[name] = (chosen.float() @ spread.float()) > 0
    return found
