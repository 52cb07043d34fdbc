"""An edit of a direction and a strength, how far it moves a model, and the strength that moves it so far."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int

from reftune.data.tokenising import Encoded
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
_TOLERANCE = 0.01
"""Of the divergence asked for, relatively."""
_PILOT = 24
"""Rows that find about where a strength lies, and how the divergence grows there."""
_NEAR, _STEP, _FAR, _MOST_CORRECTIONS = 0.12, 1.05, 1.5, 8
"""How far off the few rows may be, relatively; the step that tells the growth; the longest correction, and how many."""
_TOGETHER = 4
"""Batches whose base is in memory at a time."""


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
    rows: Sequence[Encoded] = (),
) -> Iterator[Steered]:
    """The model with the edits of these directions on it, behind gates if any, for the length of a ``with`` block.

    What all of ``rows``, those that will be run, begin with is computed once.
    """
    device = next(model.parameters()).device
    edits = {site: edit_of(direction, 1.0, remove) for site, direction in directions.items()}
    edits = {site: (gated_edit(edit, gates[site]) if gates else edit).to(device) for site, edit in edits.items()}
    reuse = "off" if parse_positions(positions).everywhere else "auto"  # an edit of every token leaves nothing alone
    with attach(model, edits=edits, positions=positions, name=_NAME):
        found = Steered(model.__dict__[ENGINE].placements(_NAME), PrefixSwitch(reuse, None, [rows]))
        found.at(strength)
        try:
            yield found
        finally:
            found.prefixes.close()


@dataclass(frozen=True)
class Effect:
    """What edits do to neutral answers, in sums over the tokens of each row, in nats.

    Attributes:
        strength: of the edits.
        tokens: of each row.
        kl: KL(base, edited).
        loss: with the edits.
        base_loss: without them, of a token.
    """

    strength: float
    tokens: Int[np.ndarray, " rows"]
    kl: Float[np.ndarray, " rows"]
    loss: Float[np.ndarray, " rows"]
    base_loss: float

    def kl_of(self, rows: slice = slice(None)) -> float:
        """The divergence of some rows, a token."""
        return float(self.kl[rows].sum() / self.tokens[rows].sum())

    def scaled_to(self, kl: float, power: float) -> Effect:
        """The effect at the strength near by that has another divergence, which grows with this power of it."""
        factor, base = kl / self.kl_of(), self.base_loss * self.tokens
        loss = base + factor * (self.loss - base)
        return replace(self, strength=self.strength * factor ** (1 / power), kl=factor * self.kl, loss=loss)

    @property
    def told(self) -> tuple[float, float | None, float]:
        """Divergence, its standard error over rows (None of a single one), and loss, each of a token."""
        total, count, kl = float(self.tokens.sum()), len(self.tokens), self.kl_of()
        spread = float(((self.kl - kl * self.tokens) ** 2).sum())
        error = math.sqrt(count / (count - 1) * spread) / total if count > 1 else None
        return kl, error, float(self.loss.sum()) / total


@dataclass(frozen=True)
class Neutral:
    """Measures edits on neutral answers; of the base only what a few rows need is in memory at a time.

    Attributes:
        model: with the edits.
        rows: prompts with plain answers.
        pad: the tokenizer's padding token.
        batch_size: rows of one forward.
    """

    model: Any
    rows: list[Encoded]
    pad: int
    batch_size: int

    def _against(self, rows: list[Encoded], steered: Steered) -> AgainstBase:
        return AgainstBase(self.model, rows, self.pad, self.batch_size, steered.at(0.0))

    def effect(self, steered: Steered, strength: float) -> Effect:
        """What the edits do at this strength."""
        found, base_loss = [], 0.0
        for start in range(0, len(self.rows), _TOGETHER * self.batch_size):
            part = self._against(self.rows[start : start + _TOGETHER * self.batch_size], steered)
            found.append((part.row_tokens, *part.by_row(forward=steered.at(strength))))
            base_loss += part.base_loss * part.tokens
        tokens, kl, loss = (np.concatenate(of) for of in zip(*found, strict=True))
        return Effect(strength, tokens, kl, loss, base_loss / float(tokens.sum()))

    def calibrated(self, steered: Steered, wanted: float, start: float) -> tuple[Effect, list[float]]:
        """The strength with the divergence that is wanted: near it by a few rows, and from there by all.

        Args:
            steered: the edits.
            wanted: nats a token.
            start: the strength to look from.

        Returns:
            The effect at that strength; and each half's divergence at the strength found on the other half alone.

        Raises:
            ReftuneError: no strength has it.
        """
        few = self._against(self.rows[:: math.ceil(len(self.rows) / _PILOT)], steered)

        @cache
        def divergence(strength: float) -> float:
            return few(forward=steered.at(strength))[0]

        near, kl = strength_for(wanted, divergence, start), 0.0
        for _ in range(_MOST_CORRECTIONS):
            around = self.effect(steered, near)
            kl = around.kl_of()
            power = math.log(divergence(near * _STEP) / divergence(near), _STEP)
            if abs(kl / wanted - 1) <= _NEAR and power > 0:
                break
            near *= min(max((wanted / kl) ** (1 / power), 1 / _FAR), _FAR) if power > 0 and kl > 0 else _FAR
        else:
            raise _out_of_reach(wanted, kl)
        one, other = slice(0, None, 2), slice(1, None, 2)
        if len(self.rows) == 1:
            return around.scaled_to(wanted, power), [wanted]
        ratio = around.kl_of(one) / around.kl_of(other)
        return around.scaled_to(wanted, power), [wanted * ratio, wanted / ratio]


def strength_for(
    wanted: float, divergence: Callable[[float], float], start: float = 1.0, tolerance: float = _TOLERANCE
) -> float:
    """The strength of this sign at which the divergence is what is wanted, by bisection.

    A small edit's divergence grows with the square of its strength, which says where to look first.

    Args:
        wanted: nats a token, above 0.
        divergence: of a strength.
        start: the first strength tried; its sign is kept.
        tolerance: of what is wanted, relatively.

    Raises:
        ReftuneError: no strength up to a million times the first has that much.
    """
    low, high = 0.0, math.inf
    factor, found = 1.0, 0.0
    for _ in range(_MOST_STEPS):
        found = divergence(start * factor)
        if abs(found - wanted) <= tolerance * wanted:
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
    raise _out_of_reach(wanted, found)


def _out_of_reach(wanted: float, found: float) -> ReftuneError:
    return ReftuneError(
        f"kl={wanted}: no strength gives this divergence; the nearest found was {found:.4g} nats a token."
    )
