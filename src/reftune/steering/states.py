"""The hidden states of rows at every layer, in one pass, as many as there are rows without more memory."""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import DynamicLayer

from reftune.data.tokenising import Encoded
from reftune.engine.hooks import edit_passing
from reftune.engine.position_grammar import Positions
from reftune.engine.sites import Site
from reftune.engine.stand_ins import OwnThread
from reftune.errors import ReftuneError
from reftune.training.prefix.obstacles import cache_obstacle, missing_arguments, rope_obstacle
from reftune.training.prefix.partial_forward import WholeCache
from reftune.training.prefix.shared_beginning import shared_beginning

States = Float[np.ndarray, "rows layers width"]


def edited_tokens(row: Encoded, positions: Positions) -> list[int]:
    """The tokens of a row that an edit changes to some effect: the last token of an answer predicts nothing."""
    total = len(row["input_ids"])
    seen = total if total == row["prompt_length"] else total - 1
    return sorted(ordinal for ordinal in positions.ordinals(row["prompt_length"], total) if ordinal < seen)


@contextmanager
def mean_states(
    model: Any,
    rows: Sequence[Encoded],
    sites: Sequence[Site],
    positions: Positions,
    pad_token_id: int,
    batch_size: int,
    advance: Any = None,
) -> Iterator[States]:
    """Each row's mean hidden state over the tokens that an edit changes, in float32 whatever the model's dtype.

    The array is a file that is gone when the context ends; the model's memory is that of a forward of one batch.

    Args:
        model: a transformers model; it is run as it is.
        rows: tokenised rows.
        sites: where, all of one width.
        positions: which tokens.
        pad_token_id: fills short rows.
        batch_size: rows of one forward.
        advance: is called with the number of rows that were run.

    Yields:
        (rows, layers, width).
    """
    with tempfile.TemporaryDirectory() as folder:
        shape = (len(rows), len(sites), sites[0].width)
        found = np.memmap(Path(folder) / "states", np.float32, "w+", shape=shape)
        begun = _beginning(model, rows, positions)
        for batch in _batches(rows, positions, pad_token_id, batch_size):
            edited = batch.edited[:, begun.tokens :]
            weights = edited / edited.sum(-1, keepdim=True)
            read = _read(
                model, sites, batch, begun, lambda hidden, w=weights: w.to(hidden).unsqueeze(1).bmm(hidden).squeeze(1)
            )
            found[batch.indices] = torch.stack(read).transpose(0, 1).numpy()
            if advance is not None:
                advance(len(batch.indices))
        yield found


def token_states(
    model: Any,
    rows: Sequence[Encoded],
    sites: Sequence[Site],
    positions: Positions,
    pad_token_id: int,
    batch_size: int,
) -> list[Float[np.ndarray, "layers tokens width"]]:
    """Row by row, the states of every token that an edit changes, in float32; arguments as for ``mean_states``."""
    found: list[np.ndarray] = [np.empty(0)] * len(rows)
    begun = _beginning(model, rows, positions)
    for batch in _batches(rows, positions, pad_token_id, batch_size):
        chosen = batch.edited[:, begun.tokens :].bool()
        read = torch.stack(
            _read(model, sites, batch, begun, lambda hidden, chosen=chosen: hidden[chosen.to(hidden.device)])
        )
        ends = chosen.sum(-1).cumsum(0)[:-1].tolist()
        for index, states in zip(batch.indices, read.tensor_split(ends, dim=1), strict=True):
            found[index] = states.numpy()
    return found


@dataclass(frozen=True)
class _Batch:
    """Rows of one forward, by their indices; ``edited`` is 1 at tokens that an edit changes."""

    indices: list[int]
    ids: Int[Tensor, "batch position"]
    mask: Int[Tensor, "batch position"]
    edited: Float[Tensor, "batch position"]


@dataclass(frozen=True)
class _Beginning:
    """What all rows begin with and no edit touches: the number of its tokens, and each layer's keys and values."""

    tokens: int = 0
    layers: Sequence[tuple[Tensor, Tensor]] = ()


@torch.no_grad()
def _beginning(model: Any, rows: Sequence[Encoded], positions: Positions) -> _Beginning:
    """Run once what all rows begin with (a system prompt, a template); nothing where a cache would not be exact."""
    if missing_arguments(model) or cache_obstacle(model.config) or rope_obstacle(model.config):
        return _Beginning()
    ids = shared_beginning(rows, [positions])
    if not len(ids):
        return _Beginning()
    cache = WholeCache(model.config)
    model(input_ids=ids.unsqueeze(0).to(model.device), past_key_values=cache, use_cache=True)
    return _Beginning(len(ids), [(layer.keys, layer.values) for layer in cache.layers])  # type: ignore[union-attr]


def _batches(rows: Sequence[Encoded], positions: Positions, pad_token_id: int, batch_size: int) -> Iterator[_Batch]:
    by_length = sorted(range(len(rows)), key=lambda index: len(rows[index]["input_ids"]))
    for start in range(0, len(by_length), batch_size):
        indices = by_length[start : start + batch_size]
        longest = len(rows[indices[-1]]["input_ids"])
        ids = torch.full((len(indices), longest), pad_token_id)
        mask, edited = torch.zeros_like(ids), torch.zeros(ids.shape)
        for place, row in enumerate(rows[index] for index in indices):
            ids[place, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
            mask[place, : len(row["input_ids"])] = 1
            edited[place, edited_tokens(row, positions)] = 1
        if not bool(edited.any(-1).all()):
            raise ReftuneError(
                f"positions={positions.text!r} edits no token of some rows (texts without answers have no generated "
                "tokens): choose positions that every row has."
            )
        yield _Batch(indices, ids, mask, edited)


@torch.no_grad()
def _read(
    model: Any, sites: Sequence[Site], batch: _Batch, begun: _Beginning, take: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """What ``take`` makes of each site's states (batch, position from ``begun`` on, width), in float32 on the CPU."""
    read: list[Tensor] = [torch.empty(0)] * len(sites)
    thread, device = OwnThread(), next(model.parameters()).device
    ids = batch.ids[:, begun.tokens :].to(device)
    known: dict[str, Any] = {"use_cache": False}
    if begun.layers:
        cache = WholeCache(model.config)
        for layer, states in zip(cache.layers, begun.layers, strict=True):
            assert isinstance(layer, DynamicLayer)  # cache_obstacle refuses every other kind
            layer.update(*(of.expand(len(ids), -1, -1, -1) for of in states))
        places = torch.arange(begun.tokens, batch.ids.shape[1], device=device).expand(len(ids), -1)
        known = {"past_key_values": cache, "use_cache": True, "position_ids": places}

    def keep(place: int, hidden: Tensor) -> Tensor:
        if thread.here:
            read[place] = take(hidden.reshape(*ids.shape, -1).float()).cpu()
        return hidden

    handles: list[RemovableHandle] = []
    try:
        for place, site in enumerate(sites):
            handles.append(edit_passing(model, site, partial(keep, place)))
        few = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
        model(input_ids=ids, attention_mask=batch.mask.to(device), **known, **few)
    finally:
        for handle in handles:
            handle.remove()
    return read
