"""An edit of a direction and a strength, how far it moves a model, and the strength that moves it so far."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch.nn import functional

from reftune.data.collating import CompletionCollator
from reftune.data.tokenising import Encoded
from reftune.edits import ConsreftEdit, LobireftEdit, RotatedEdit
from reftune.engine.attach import attach
from reftune.engine.sites import Site
from reftune.errors import ReftuneError
from reftune.steering.directions import Direction
from reftune.steering.gates import Gate, gated_edit
from reftune.training.prompt_ends import with_prompt_ends
from reftune.training.supervised_logits import SupervisedLogits, supervised_forward

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


class AgainstBase:
    """What an edit does to answers of the base: KL(base | edited) and their loss, each a mean over tokens, in nats.

    The base's logits are computed once, where the object is made, and kept in the model's dtype.

    Args:
        model: without edits yet.
        rows: tokenised prompts with answers.
        pad_token_id: fills short rows.
        batch_size: rows of one forward.
    """

    def __init__(self, model: Any, rows: Sequence[Encoded], pad_token_id: int, batch_size: int):
        collate, device = CompletionCollator(pad_token_id), next(model.parameters()).device
        ordered = sorted(rows, key=lambda row: len(row["input_ids"]))
        self.model = model
        self._batches: list[dict[str, Any]] = []
        for start in range(0, len(ordered), batch_size):
            batch = collate(ordered[start : start + batch_size])
            self._batches.append({name: value.to(device) for name, value in batch.items()})
        self._base = [self._forward(batch) for batch in self._batches]
        self.base_loss = self._mean(_losses(base) for base in self._base)

    @torch.no_grad()
    def _forward(self, batch: dict[str, Any]) -> SupervisedLogits:
        found = supervised_forward(self.model, with_prompt_ends(self.model, batch))
        return replace(found, outputs=None)

    def _mean(self, sums: Iterable[float]) -> float:
        return sum(sums) / sum(base.targets.numel() for base in self._base)

    def __call__(self) -> tuple[float, float]:
        """The divergence and the loss of the model as it is now."""
        now = [self._forward(batch) for batch in self._batches]
        apart = (
            functional.kl_div(
                one.logits[0].float().log_softmax(-1), base.logits[0].float().log_softmax(-1),
                log_target=True, reduction="sum",
            ).item()
            for one, base in zip(now, self._base, strict=True)
        )  # fmt: skip
        return self._mean(apart), self._mean(_losses(one) for one in now)


def _losses(found: SupervisedLogits) -> float:
    return functional.cross_entropy(found.logits[0].float(), found.targets[0], reduction="sum").item()


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
