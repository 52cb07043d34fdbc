"""What ``generate`` was given: the prompts and masks from which each of its forwards gets a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from reftune.engine.position_grammar import Positions
from reftune.engine.position_plan import NOTHING, Mask, PastPrompt, PositionPlan
from reftune.engine.positions import TokenLayout
from reftune.engine.traced_layout import layout_of
from reftune.errors import ReftuneError


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
        read: whether a forward has taken in the end of the prompt, so that what follows is generated.
    """

    attended: Bool[Tensor, "batch length"]
    mask: Mask = None
    directions: Mapping[str, Tensor] = field(default_factory=dict)
    encoder_mask: Any = None
    first_edited: int | None = field(default=None, init=False)
    read: bool = field(default=False, init=False)

    def is_past(self, past_length: Any) -> bool:
        """Whether a forward after ``past_length`` cached tokens holds generated tokens only.

        A static cache counts in a tensor, at which a graph must not look: there an earlier forward has seen it.
        """
        if isinstance(past_length, Tensor) and torch.compiler.is_compiling():
            return self.read
        return bool(past_length >= self.attended.shape[1])

    def plan(
        self,
        batch: int,
        sequence: int,
        past_length: Any,
        active: Mapping[str, Positions],
        device: torch.device,
        row_adapters: Sequence[str] | None = None,
    ) -> PositionPlan | None:
        """The plan of one forward inside ``generate``; rows are repeated for beams and return sequences.

        Args:
            batch: of the forward's tokens, a multiple of the prompt's.
            sequence: of the forward's tokens.
            past_length: tokens in the cache before it, an int or a static cache's tensor.
            active: positions of the active adapters.
            device: of the forward's tokens.
            row_adapters: as for ``PositionPlan``.
        """
        compiling = torch.compiler.is_compiling()
        if not compiling:
            past_length = int(past_length)
            self.read = self.read or past_length + sequence >= self.attended.shape[1]
        masked = active if isinstance(self.mask, Tensor) else self.mask or {}
        edits_on = any(p.generated and name not in masked for name, p in active.items())
        is_past = self.is_past(past_length)
        if is_past and not edits_on:
            return NOTHING
        rows, length = self.attended.shape
        if batch % rows:
            raise ReftuneError(f"generate began with {rows} rows and now runs {batch}: positions cannot be kept.")
        copies = batch // rows
        directions = {name: one.repeat_interleave(copies, dim=0) for name, one in self.directions.items()}
        if is_past:
            if self.first_edited is None:
                self.first_edited = length if compiling else past_length
            return PastPrompt(batch, list(masked), row_adapters, directions)

        def seen(mask: Tensor, fill: bool) -> Tensor:
            """A mask over the prompt, for the present tokens and those before them."""
            mask = mask.to(device).repeat_interleave(copies, dim=0)
            if isinstance(past_length, Tensor):
                return torch.cat([mask, mask.new_full((batch, sequence), fill)], dim=1)
            if past_length + sequence > length:
                mask = torch.cat([mask, mask.new_full((batch, past_length + sequence - length), fill)], dim=1)
            return mask[:, : past_length + sequence]

        def present(mask: Tensor) -> Tensor:
            mask = seen(mask, False)
            if isinstance(past_length, Tensor):
                columns = torch.arange(sequence, device=device) + past_length
                return mask.index_select(1, columns.clamp(max=mask.shape[1] - 1))
            return mask[:, past_length:]

        layout = layout_of(
            batch=batch,
            sequence=sequence,
            device=device,
            past_length=past_length,
            attention_mask=seen(self.attended, True),
            prompt_lengths=self.attended.sum(-1).to(device).repeat_interleave(copies),
        )
        mask: Mask = None
        if isinstance(self.mask, Mapping):
            mask = {name: present(one) for name, one in self.mask.items()}
        elif self.mask is not None:
            mask = present(self.mask)
        if compiling:  # which token was the first is a value
            self.first_edited = 0
        else:
            self._remember_first_edit(layout, mask, past_length, active)
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
