"""What ``generate`` was given: the prompts and masks from which each of its forwards gets a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from reftune.errors import ReftuneError
from reftune.positions import NOTHING, Mask, PositionPlan, Positions, TokenLayout, read_layout


@dataclass
class PromptMemory:
    """What ``generate`` was given, kept for its forwards.

    Decode steps, chunks, candidates and beams have no other source.

    Attributes:
        attended: the prompt's mask, (batch, length).
        mask: an ``intervention_mask`` over the prompt (or one by adapter name), or None.
        directions: the directions that act on each row, by adapter name.
        encoder_mask: the same over an encoder-decoder's encoder input.
        first_edited: the first cache column that an edit touched so far (a later turn re-prefills from there).
    """

    attended: Bool[Tensor, "batch length"]
    mask: Mask = None
    directions: Mapping[str, Tensor] = field(default_factory=dict)
    encoder_mask: Any = None
    first_edited: int | None = field(default=None, init=False)

    def is_past(self, past_length: int) -> bool:
        """Whether a forward after ``past_length`` cached tokens holds generated tokens only."""
        return past_length >= self.attended.shape[1]

    def plan(
        self,
        batch: int,
        sequence: int,
        past_length: int,
        active: Mapping[str, Positions],
        device: torch.device,
        row_adapters: Sequence[str] | None = None,
    ) -> PositionPlan | None:
        """The plan of one forward inside ``generate``; rows are repeated for beams and return sequences.

        Args:
            batch: of the forward's tokens, a multiple of the prompt's.
            sequence: of the forward's tokens.
            past_length: tokens in the cache before it.
            active: positions of the active adapters.
            device: of the forward's tokens.
            row_adapters: as for ``PositionPlan``.
        """
        masked = active if isinstance(self.mask, Tensor) else self.mask or {}
        if self.is_past(past_length) and all(p.stays_in_prompt or name in masked for name, p in active.items()):
            return NOTHING
        rows, length = self.attended.shape
        if batch % rows:
            raise ReftuneError(f"generate began with {rows} rows and now runs {batch}: positions cannot be kept.")
        total = past_length + sequence

        def grown(mask: Tensor, fill: bool) -> Tensor:
            mask = mask.to(device).repeat_interleave(batch // rows, dim=0)
            if total > length:
                mask = torch.cat([mask, mask.new_full((batch, total - length), fill)], dim=1)
            return mask[:, :total]

        attended = grown(self.attended, True)
        lengths = self.attended.sum(-1).to(device).repeat_interleave(batch // rows)
        layout = read_layout(
            batch=batch,
            sequence=sequence,
            device=device,
            past_length=past_length,
            attention_mask=attended,
            prompt_lengths=lengths,
        )
        mask: Mask = None
        if isinstance(self.mask, Mapping):
            mask = {name: grown(one, False)[:, past_length:] for name, one in self.mask.items()}
        elif self.mask is not None:
            mask = grown(self.mask, False)[:, past_length:]
        self._remember_first_edit(layout, mask, past_length, active)
        directions = {name: one.repeat_interleave(batch // rows, dim=0) for name, one in self.directions.items()}
        return PositionPlan(layout, mask, row_adapters=row_adapters, directions=directions)

    def _remember_first_edit(
        self, layout: TokenLayout, mask: Mask, past_length: int, active: Mapping[str, Positions]
    ) -> None:
        if self.first_edited is not None or not active:
            return
        masks = mask if isinstance(mask, Mapping) else {}
        selected = [masks[name] if name in masks else layout.selected(p) for name, p in active.items()]
        selected = [mask] if isinstance(mask, Tensor) else selected
        columns = torch.stack(selected).any(0).any(0).nonzero()
        if len(columns):
            self.first_edited = past_length + int(columns[0])
