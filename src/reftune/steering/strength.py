"""An edit of a direction and a strength, how far it moves a model, and the strength that moves it so far."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from reftune.edits import ConsreftEdit, LobireftEdit, RotatedEdit
from reftune.engine.attach import attach
from reftune.engine.hooks import ENGINE
from reftune.engine.intervention import Placement
from reftune.engine.position_grammar import parse_positions
from reftune.engine.sites import Site
from reftune.errors import ReftuneError
from reftune.evaluation.side_effects import AgainstBase
from reftune.steering.directions import Direction
from reftune.steering.gates import Gate, gated_edit
from reftune.training.objectives import Forward
from reftune.training.prefix.switch import PrefixSwitch

_MOST_STEPS = 40
_NAME = "steering"
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


@dataclass(frozen=True)
class Steered:
    """Edits on a model, whose strength can be changed while what they leave alone is computed once.

    Attributes:
        placements: where they are.
        prefixes: runs a forward on what they change.
    """

    placements: list[Placement]
    prefixes: PrefixSwitch

    def at(self, strength: float) -> Forward:
        """**Changes the edits**; the forward of the model with them so strong, and at 0 of the base."""
        for placement in self.placements:
            placement.scale = strength
        return self.prefixes.forward


@contextmanager
def steered(
    model: Any,
    directions: Mapping[Site, Direction],
    positions: str,
    strength: float = 1.0,
    remove: bool = False,
    gates: Mapping[Site, Gate] | None = None,
) -> Iterator[Steered]:
    """The model with the edits of these directions on it, behind gates if any, for the length of a ``with`` block."""
    device = next(model.parameters()).device
    edits = {site: edit_of(direction, 1.0, remove) for site, direction in directions.items()}
    edits = {site: (gated_edit(edit, gates[site]) if gates else edit).to(device) for site, edit in edits.items()}
    reuse = "off" if parse_positions(positions).everywhere else "auto"  # an edit of every token leaves nothing alone
    with attach(model, edits=edits, positions=positions, name=_NAME):
        found = Steered(model.__dict__[ENGINE].placements(_NAME), PrefixSwitch(reuse, None, []))
        found.at(strength)
        try:
            yield found
        finally:
            found.prefixes.close()


def over_tokens(parts: Sequence[AgainstBase], means: Sequence[float]) -> float:
    """The mean over all parts' tokens, from each part's own."""
    return sum(part.tokens * mean for part, mean in zip(parts, means, strict=True)) / sum(p.tokens for p in parts)


def divergence(parts: Sequence[AgainstBase], forward: Forward) -> tuple[float, float]:
    """Divergence and loss over the rows of all parts."""
    kls, losses = zip(*(part(forward=forward) for part in parts), strict=True)
    return over_tokens(parts, kls), over_tokens(parts, losses)


def calibrated(
    parts: Sequence[AgainstBase], steered: Steered, wanted: float, start: float
) -> tuple[float, list[float]]:
    """The strength at which all rows have the divergence that is wanted, and what it is on rows that did not find it.

    Args:
        parts: the rows in two halves (one, where there is a single row).
        steered: the edits.
        wanted: nats a token.
        start: the strength to look from.

    Returns:
        The strength; and each half's divergence at the strength that was found on the other half alone.
    """
    own = [strength_for(wanted, lambda at, part=part: part(forward=steered.at(at))[0], start) for part in parts]
    other = [part(forward=steered.at(at))[0] for part, at in zip(parts, reversed(own), strict=True)]
    middle = math.copysign(math.prod(map(abs, own)) ** (1 / len(own)), start)
    return strength_for(wanted, lambda at: divergence(parts, steered.at(at))[0], middle), other


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
