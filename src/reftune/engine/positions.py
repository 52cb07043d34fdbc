"""Which tokens an edit touches: the one reading of padding, caches, packing and labels.

The words used here, and everywhere else in the library:

- **attended token**: a token that the attention mask keeps. Padding is never counted and never edited.
- **ordinal**: a token's index among the attended tokens of its row (or of its document, in packed rows), those already
  in the key-value cache included. Positions are decided on ordinals, never on a tensor's sequence dimension, which is
  why padding side, batch, cache and chunking cannot change what is edited.
- **prompt length** ``n``: how many attended tokens of the row belong to the prompt. The last prompt token is ``l1``.

How positions are written is in ``position_grammar.py``.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from reftune.engine.position_grammar import Positions
from reftune.errors import ReftuneError, tell_once

Part = Literal["both", "prefix", "suffix"]
IGNORED_LABEL = -100

SEVERAL_TURNS = (
    "A training row has several answers (TRL's assistant_only_loss, for one): prompt positions are those of the prompt "
    "before its first answer, whereas in use each answer's own prompt is edited. Make one row an answer, as "
    "`reftune train` does, or use positions='all'."
)
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenLayout:
    """What one forward says about its tokens.

    Attributes:
        attended: which of the forward's tokens the mask keeps, (batch, sequence).
        ordinal: their ordinals, (batch, sequence); meaningless where not attended.
        prompt_length: prompt length of the row or document that a token belongs to, (batch, 1) or (batch, sequence);
            None when no active position needs it.
    """

    attended: Bool[Tensor, "batch sequence"]
    ordinal: Int[Tensor, "batch sequence"]
    prompt_length: Int[Tensor, "batch _"] | None

    def selected(self, positions: Positions, part: Part = "both") -> Bool[Tensor, "batch sequence"]:
        """The tokens that an edit at ``positions`` touches.

        Args:
            positions: of the edit.
            part: of an untied pair, the edit of the prefix, or that of the suffix and what follows it.
        """
        if positions.everywhere:
            return self.attended
        assert self.prompt_length is not None
        in_prompt = self.attended & (self.ordinal < self.prompt_length)
        prefix, suffix = positions.counts(self.prompt_length)
        in_prefix = in_prompt & (self.ordinal < prefix)
        in_suffix = in_prompt & (self.ordinal >= self.prompt_length - suffix)
        if positions.prompt:
            in_prefix = in_prompt
        if positions.generated:
            in_suffix = in_suffix | (self.attended & ~in_prompt)
        return {"both": in_prefix | in_suffix, "prefix": in_prefix, "suffix": in_suffix}[part]


def whole_rows(batch: int, sequence: int, device: torch.device) -> TokenLayout:
    """The layout of an unpadded input that is all prompt (an image's patches, an encoder's row)."""
    attended = torch.ones(batch, sequence, dtype=torch.bool, device=device)
    ordinal = torch.arange(sequence, device=device).expand(batch, sequence)
    return TokenLayout(attended, ordinal, torch.full((batch, 1), sequence, device=device))


def read_layout(
    *,
    batch: int,
    sequence: int,
    device: torch.device,
    past_length: int = 0,
    attention_mask: Any = None,
    position_ids: Tensor | None = None,
    document_starts: Int[Tensor, " _"] | None = None,
    labels: Tensor | None = None,
    label_offset: int = 0,
    prompt_lengths: Any = None,
    needs_prompt: bool = True,
    must_know_prompt: str | None = None,
) -> TokenLayout:
    """Read one forward's tokens from its arguments.

    Args:
        batch: of the forward's tokens.
        sequence: of the forward's tokens.
        device: of the forward's tokens.
        past_length: tokens per row already in the cache.
        attention_mask: 2-D (batch, past + sequence) or None (everything attended).
        position_ids: used to find the documents of packed rows (several zeros in a row).
        document_starts: cumulative lengths of packed documents (``cu_seq_lens_q``), which settle them outright.
        labels: (batch, sequence) of a causal language model; the prompt ends before the first supervised one.
        label_offset: 1 for a decoder whose input i predicts label i (encoder-decoder), 0 where label i is token i.
        prompt_lengths: (batch,), or (documents,) in packed rows; settles the prompt outright.
        needs_prompt: whether any active position needs the prompt's end.
        must_know_prompt: when not None, having neither labels nor lengths is an error, and this says where; None means
            that every attended token is prompt.

    Raises:
        ReftuneError: a mask or lengths of a wrong shape, an unknown prompt end, or an empty prompt in training.
    """
    attended_all = full_mask(attention_mask, batch, past_length, sequence, device)
    attended = attended_all[:, past_length:]
    ordinal = attended_all.cumsum(-1)[:, past_length:] - 1
    documents = None
    if past_length == 0:
        documents = _documents(document_starts, position_ids, attended)
    if documents is not None:
        columns = torch.arange(sequence, device=device)
        starts = torch.where(documents, columns, 0).cummax(-1).values
        ordinal = columns - starts
    if not needs_prompt:
        return TokenLayout(attended, ordinal, None)

    if prompt_lengths is not None:
        count = batch if documents is None else int(documents.sum())
        lengths = check_lengths(prompt_lengths, count, device)
        if documents is not None:
            return TokenLayout(attended, ordinal, lengths[documents.flatten().cumsum(0) - 1].view(batch, sequence))
        return TokenLayout(attended, ordinal, lengths.view(batch, 1))
    if past_length > 0:
        raise ReftuneError(
            "A forward that continues a key-value cache does not say where its prompt ended. Generate with "
            "model.generate(...), or pass prompt_lengths (batch,) to every forward of the loop."
        )
    if labels is None:
        if must_know_prompt is not None:
            raise ReftuneError(must_know_prompt)
        if documents is None:
            return TokenLayout(attended, ordinal, attended_all.sum(-1, keepdim=True))
        supervised = torch.zeros_like(attended)
    else:
        if tuple(labels.shape) != (batch, sequence):
            raise ReftuneError(f"labels have shape {tuple(labels.shape)}, the tokens {(batch, sequence)}.")
        supervised = labels.to(device) != IGNORED_LABEL
    lengths = _lengths_from_labels(supervised, attended, ordinal, documents, label_offset)
    if must_know_prompt is not None and bool((lengths == 0).any()):
        raise ReftuneError(
            "A row has an empty prompt: its first token is already supervised, so a prompt position edits nothing "
            "there. Train on completions only (labels of the prompt set to -100; in TRL completion_only_loss=True with "
            "prompt/completion data), pass prompt_lengths, or use positions='all'."
        )
    if must_know_prompt is not None and bool(_supervised_again(supervised, attended, ordinal, lengths).any()):
        tell_once(logger, SEVERAL_TURNS)
    return TokenLayout(attended, ordinal, lengths)


def is_token_mask(mask: Any, batch: int, sequence: int) -> bool:
    """Whether a forward's ``attention_mask`` has a column for each of its tokens (and perhaps for those before)."""
    return isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[0] == batch and mask.shape[1] >= sequence


def full_mask(
    mask: Any, batch: int, past: int, sequence: int, device: torch.device, whole: bool = False
) -> Bool[Tensor, "batch length"]:
    """A forward's 2-D attention mask over past and present tokens, (batch, past + sequence).

    Args:
        mask: as the model was given it; None: everything is attended.
        batch: of the forward's tokens.
        past: tokens per row already in the cache.
        sequence: of the forward's tokens.
        device: of the result.
        whole: keep what a mask holds beyond that (a static cache's empty places).

    Raises:
        ReftuneError: a mask of another shape.
    """
    if mask is None:
        return torch.ones(batch, past + sequence, dtype=torch.bool, device=device)
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ReftuneError(
            f"attention_mask of shape {shape}: positions are read from a 2-D mask (batch, sequence). Pass that one, or "
            "an intervention_mask (batch, sequence)."
        )
    mask = mask.to(device) != 0
    if mask.shape[1] == sequence and past:
        mask = torch.cat([mask.new_ones(batch, past), mask], dim=1)
    if mask.shape[0] != batch or mask.shape[1] < past + sequence:
        raise ReftuneError(f"attention_mask has shape {tuple(mask.shape)}, expected {(batch, past + sequence)}.")
    return mask if whole else mask[:, : past + sequence]


def _documents(
    document_starts: Tensor | None, position_ids: Tensor | None, attended: Tensor
) -> Bool[Tensor, "batch sequence"] | None:
    """Where the documents of packed rows begin; None when rows are not packed."""
    batch, sequence = attended.shape
    if document_starts is not None:
        starts = torch.zeros(batch * sequence, dtype=torch.bool, device=attended.device)
        cumulative = document_starts.to(attended.device).long()
        starts[cumulative[cumulative < batch * sequence]] = True
        return starts.view(batch, sequence)
    if position_ids is None or position_ids.ndim != 2 or position_ids.shape[-1] != sequence:
        return None
    starts = (position_ids.to(attended.device) == 0).expand(batch, sequence)
    if not bool(attended.all()) or not bool((starts.sum(-1) > 1).any()):
        return None
    starts = starts.clone()
    starts[:, 0] = True
    return starts


def _lengths_from_labels(
    supervised: Tensor, attended: Tensor, ordinal: Tensor, documents: Tensor | None, offset: int
) -> Int[Tensor, "batch _"]:
    """Attended tokens before the first supervised label of each row or document (all of them where there is none)."""
    supervised = supervised & attended
    beyond = torch.iinfo(torch.long).max
    first = torch.where(supervised, ordinal + offset, beyond)
    if documents is None:
        return torch.minimum(first.min(-1, keepdim=True).values, attended.sum(-1, keepdim=True))
    batch, sequence = attended.shape
    document = documents.flatten().cumsum(0) - 1
    count = int(document[-1]) + 1
    firsts = first.new_full((count,), beyond).scatter_reduce(0, document, first.flatten(), "amin")
    sizes = torch.bincount(document, minlength=count)
    return torch.minimum(firsts, sizes)[document].view(batch, sequence)


def _supervised_again(supervised: Tensor, attended: Tensor, ordinal: Tensor, lengths: Tensor) -> Tensor:
    """Where a second or later stretch of supervised tokens of a row or document begins, (batch, sequence)."""
    return supervised & attended & ~supervised.roll(1, -1) & (ordinal > lengths)


def check_lengths(lengths: Any, count: int | None, device: torch.device) -> Int[Tensor, " count"]:
    """Prompt lengths as integers, one for each of ``count`` rows or documents (None: of any number).

    Raises:
        ReftuneError: another shape or type.
    """
    lengths = torch.as_tensor(lengths, device=device)
    if lengths.is_floating_point() or lengths.ndim != 1 or count not in (None, lengths.shape[0]):
        raise ReftuneError(
            f"prompt_lengths has shape {tuple(lengths.shape)} and type {lengths.dtype}: it takes one integer for each "
            f"of the {count} rows (or packed documents), the number of attended prompt tokens."
        )
    return lengths.long()
