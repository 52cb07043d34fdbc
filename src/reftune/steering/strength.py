"""An edit of a direction and a strength, and the strength that moves a model so far."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from reftune.edits import ConsreftEdit, LobireftEdit, RotatedEdit
from reftune.engine.attach import attach
from reftune.engine.sites import Site
from reftune.errors import ReftuneError
from reftune.steering.directions import Direction
from reftune.steering.gates import Gate, gated_edit

_MOST_STEPS = 40
_TOLERANCE = 0.002
"""Of the divergence asked for, relatively."""


def edit_of(direction: Direction, strength: float, remove: bool = False) -> RotatedEdit:
    """H + s R^T b, with b the distance of the means along R; or, to remove, h - R^T R h."""
    rank, width = direction.basis.shape
    edit = (ConsreftEdit if remove else LobireftEdit)(width, rank, init="paper")
    with torch.no_grad():
        edit.rotation.copy_(torch.from_numpy(direction.basis))
        edit.bias.copy_(torch.zeros(rank) if remove else torch.from_numpy(strength * direction.shift))
    edit.retract_()
    edit.eval().requires_grad_(False)
    return edit


@contextmanager
def steered(
    model: Any,
    directions: Mapping[Site, Direction],
    positions: str,
    strength: float,
    remove: bool = False,
    gates: Mapping[Site, Gate] | None = None,
) -> Iterator[None]:
    """The model with the edits of these directions on it, behind gates if any, for the length of a ``with`` block."""
    device = next(model.parameters()).device
    edits = {site: edit_of(direction, strength, remove) for site, direction in directions.items()}
    edits = {site: (gated_edit(edit, gates[site]) if gates else edit).to(device) for site, edit in edits.items()}
    with attach(model, edits=edits, positions=positions, name="steering"):
        yield


def strength_for(wanted: float, divergence: Callable[[float], float], start: float = 1.0) -> float:
    """The strength of this sign at which the divergence is what is wanted, by bisection.

    A small edit's divergence grows with the square of its strength, which says where to look first.

    Args:
        wanted: nats a token, above 0.
        divergence: of a strength.
        start: the first strength tried; its sign is kept.

    Raises:
        ReftuneError: no strength up to a million times the first has that much.
    """
    low, high = 0.0, math.inf
    factor, found = 1.0, 0.0
    for _ in range(_MOST_STEPS):
        found = divergence(start * factor)
        if abs(found - wanted) <= _TOLERANCE * wanted:
            return start * factor
        if found < wanted:
            low = factor
        else:
            high = factor
        guess = factor * math.sqrt(wanted / found) if found > 0 else 2 * factor
        if math.isinf(high):
            factor = min(max(guess, 1.05 * factor), 10 * factor)
            if factor > 1e6:
                break
        else:
            inside = low + 0.02 * (high - low) < guess < high - 0.02 * (high - low)
            factor = guess if inside else (low + high) / 2
        if high - low < 1e-9 * high:
            break
    raise ReftuneError(
        f"kl={wanted}: no strength gives this divergence; the nearest found was {found:.4g} nats a token."
    )
