"""The hidden states of rows at every layer, in one pass, as many as there are rows without more memory."""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from reftune.data.tokenising import Encoded
from reftune.engine.hooks import edit_passing
from reftune.engine.position_grammar import Positions
from reftune.engine.sites import Site
from reftune.engine.stand_ins import OwnThread

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
    by_length = sorted(range(len(rows)), key=lambda index: len(rows[index]["input_ids"]))
    device = next(model.parameters()).device
    with tempfile.TemporaryDirectory() as folder:
        shape = (len(rows), len(sites), sites[0].width)
        found = np.memmap(Path(folder) / "states", np.float32, "w+", shape=shape)
        for start in range(0, len(by_length), batch_size):
            indices = by_length[start : start + batch_size]
            batch = [rows[index] for index in indices]
            longest = max(len(row["input_ids"]) for row in batch)
            ids = torch.full((len(batch), longest), pad_token_id)
            mask, weights = torch.zeros_like(ids), torch.zeros(ids.shape)
            for place, row in enumerate(batch):
                ids[place, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
                mask[place, : len(row["input_ids"])] = 1
                tokens = edited_tokens(row, positions)
                weights[place, tokens] = 1 / len(tokens)
            read = _read(model, sites, ids.to(device), mask.to(device), weights.to(device))
            found[indices] = read.transpose(0, 1).cpu().numpy()
            if advance is not None:
                advance(len(indices))
        yield found


@torch.no_grad()
def _read(
    model: Any, sites: Sequence[Site], ids: Tensor, mask: Tensor, weights: Float[Tensor, "batch position"]
) -> Float[Tensor, "layers batch width"]:
    read: list[Tensor] = [torch.empty(0)] * len(sites)
    thread = OwnThread()

    def keep(place: int, hidden: Tensor) -> Tensor:
        if thread.here:
            read[place] = torch.einsum("bp,bpw->bw", weights, hidden.reshape(*weights.shape, -1).float())
        return hidden

    handles: list[RemovableHandle] = []
    try:
        for place, site in enumerate(sites):
            handles.append(edit_passing(model.get_submodule(site.module_path), site.side, partial(keep, place)))
        few = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
        model(input_ids=ids, attention_mask=mask, use_cache=False, **few)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(read)
