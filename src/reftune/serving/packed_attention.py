"""Attention of a packed batch, request by request: on a CPU one dense mask over all requests costs more than the model.

transformers' continuous batching with SDPA multiplies every request's queries with every request's keys and masks what
is not theirs. Flash attention does not, but needs a GPU. Here SDPA is called once a request, on its own keys alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "reftune_by_request"


def by_request(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    cache: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function as transformers calls it; of a forward that is not packed, SDPA's own."""
    if not isinstance(cache, PagedAttentionCache):
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    layer, paged = cast(Any, module).layer_idx, cast(Any, cache)
    key, value = paged.update(key_states=key, value_states=value, layer_idx=layer, kwargs=kwargs)
    ends = zip(kwargs["cu_seq_lens_q"].tolist(), kwargs["cu_seq_lens_k"].tolist(), strict=True)
    attended = []
    q, k = next(ends)
    for q_end, k_end in ends:
        rows, columns = q_end - q, k_end - k
        mask = None
        if 1 < rows < columns:  # a later chunk: its tokens see everything before them
            mask = torch.ones(rows, columns, dtype=torch.bool, device=query.device).tril(columns - rows)
        attended.append(
            F.scaled_dot_product_attention(
                query[:, :, q:q_end], key[:, :, k:k_end], value[:, :, k:k_end], attn_mask=mask, scale=scaling,
                is_causal=rows == columns > 1, enable_gqa=query.shape[1] != key.shape[1],
            )
        )  # fmt: skip
        q, k = q_end, k_end
    together = attended[0] if len(attended) == 1 else torch.cat(attended, dim=2)
    return together.transpose(1, 2).contiguous(), None


def fits(model: Any) -> bool:
    """Whether a model's attention may be computed so: SDPA on a CPU, every layer over the whole text, nothing added."""
    text = model.config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    if getattr(text, "layer_types", None) is None and getattr(text, "sliding_window", None):
        return False
    added = getattr(text, "attn_logit_softcapping", None) or getattr(text, "alibi", False)
    plain = model.config._attn_implementation == "sdpa" and model.device.type == "cpu"
    return plain and kinds == {"full_attention"} and not added


@contextmanager
def attending_by_request(model: Any) -> Iterator[None]:
    """For the length of a ``with`` block, a model that ``fits`` attends request by request; **changes its setting**."""
    if not fits(model):
        yield
        return
    AttentionInterface.register(NAME, by_request)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation("sdpa")
