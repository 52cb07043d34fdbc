"""One forward's tokens as ``positions.read_layout`` reads them, by arithmetic alone: for ``torch.compile``.

A graph cannot look at a value without breaking. So nothing here asks one: packed rows are told from padded ones by
``where``, a static cache's length stays a tensor, and what only a value shows to be wrong (an empty prompt in training,
lengths that do not match the packed documents) is not refused, as it is outside of a graph.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from reftune.engine.positions import IGNORED_LABEL, TokenLayout, check_lengths, full_mask, read_layout
from reftune.errors import ReftuneError


def layout_of(**arguments: Any) -> TokenLayout:
    """The layout of one forward, read as its surroundings allow: inside a graph by arithmetic, else by looking.

    Args:
        **arguments: those of ``read_layout``.

    Raises:
        ReftuneError: as there.
    """
    return (traced_layout if torch.compiler.is_compiling() else read_layout)(**arguments)


def traced_layout(
    *,
    batch: int,
    sequence: int,
    device: torch.device,
    past_length: Any = 0,
    attention_mask: Any = None,
    position_ids: Tensor | None = None,
    document_starts: Int[Tensor, " _"] | None = None,
    labels: Tensor | None = None,
    label_offset: int = 0,
    prompt_lengths: Any = None,
    needs_prompt: bool = True,
    must_know_prompt: str | None = None,
) -> TokenLayout:
    """The layout of one forward; arguments and errors are ``read_layout``'s, those apart that depend on a value.

    ``past_length`` may be a static cache's tensor, with an ``attention_mask`` (batch, cache size) or of the new tokens.
    """
    attended, ordinal = _attended(attention_mask, batch, past_length, sequence, device)
    begins = None
    if isinstance(past_length, int) and past_length == 0:
        begins = _document_begins(document_starts, position_ids, attended)
    if begins is not None:
        columns = torch.arange(sequence, device=device)
        packed = (begins.sum(-1) > 1).any() if document_starts is None else attended.new_ones(())
        ordinal = torch.where(packed, columns - torch.where(begins, columns, 0).cummax(-1).values, ordinal)
    if not needs_prompt:
        return TokenLayout(attended, ordinal, None)
    if prompt_lengths is not None:
        lengths = check_lengths(prompt_lengths, None if begins is not None else batch, device)
        if begins is None:
            return TokenLayout(attended, ordinal, lengths.view(batch, 1))
        return TokenLayout(attended, ordinal, lengths[_documents(begins)].view(batch, sequence))
    if not isinstance(past_length, int) or past_length > 0:
        raise ReftuneError("A compiled forward that continues a cache needs prompt_lengths (batch,).")
    if labels is None and must_know_prompt is not None:
        raise ReftuneError(must_know_prompt)
    supervised = torch.zeros_like(attended) if labels is None else (labels.to(device) != IGNORED_LABEL) & attended
    beyond = torch.iinfo(torch.long).max
    first = torch.where(supervised, ordinal + label_offset, beyond)
    if begins is None:
        return TokenLayout(attended, ordinal, torch.minimum(first.amin(-1, keepdim=True), attended.sum(-1)[:, None]))
    document = _documents(begins)
    firsts = first.new_full((batch * sequence,), beyond).scatter_reduce(0, document, first.flatten(), "amin")
    sizes = first.new_zeros(batch * sequence).scatter_add(0, document, attended.flatten().long())
    return TokenLayout(attended, ordinal, torch.minimum(firsts, sizes)[document].view(batch, sequence))


def _attended(
    mask: Any, batch: int, past: Any, sequence: int, device: torch.device
) -> tuple[Bool[Tensor, "batch sequence"], Int[Tensor, "batch sequence"]]:
    """Which tokens are attended, and their ordinals."""
    if isinstance(past, int):
        whole = full_mask(mask, batch, past, sequence, device)
        return whole[:, past:], whole.cumsum(-1)[:, past:] - 1
    columns = torch.arange(sequence, device=device) + past
    if mask is None:
        return torch.ones(batch, sequence, dtype=torch.bool, device=device), columns.expand(batch, sequence)
    mask = full_mask(mask, batch, 0, min(sequence, mask.shape[1]), device, whole=True)
    if mask.shape[1] == sequence:  # of the new tokens alone
        return mask, past + mask.cumsum(-1) - 1
    columns = columns.clamp(max=mask.shape[1] - 1)
    return mask.index_select(1, columns), mask.cumsum(-1).index_select(1, columns) - 1


def _document_begins(
    document_starts: Tensor | None, position_ids: Tensor | None, attended: Tensor
) -> Bool[Tensor, "batch sequence"] | None:
    """Where documents begin; only at the first column of rows that are not packed. None where nothing could tell."""
    batch, sequence = attended.shape
    first = torch.arange(sequence, device=attended.device) == 0
    if document_starts is not None:
        places = torch.arange(batch * sequence, device=attended.device)
        return torch.isin(places, document_starts.to(attended.device).long()).view(batch, sequence)
    if position_ids is None or position_ids.ndim != 2 or position_ids.shape[-1] != sequence:
        return None
    zeros = (position_ids.to(attended.device) == 0).expand(batch, sequence)
    packed = attended.all() & (zeros.sum(-1) > 1).any()
    return (zeros & packed) | first


def _documents(begins: Tensor) -> Int[Tensor, " tokens"]:
    """The number of the document that each token belongs to."""
    return begins.flatten().cumsum(0) - 1
