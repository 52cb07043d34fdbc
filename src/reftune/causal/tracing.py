"""Causal tracing: blur a subject, put single clean states back, and see where the fact comes back.

Source: Meng et al., "Locating and Editing Factual Associations in GPT" (arXiv 2202.05262), section 2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from reftune.causal.heat_map import HeatMap
from reftune.causal.interchange import Intervention, Run, Source
from reftune.causal.locations import Indices, Location
from reftune.causal.patching import cells_of, probability
from reftune.causal.reuse import batch_of, picked_inputs
from reftune.causal.sweep import sweep
from reftune.engine.sites import Layers
from reftune.errors import ReftuneError


@dataclass(frozen=True)
class Trace:
    """What a causal trace found, averaged over prompts and noise.

    Attributes:
        heat_map: probability of the answer with one clean state (or window) put back, by layer and position.
        clean: probability of the answer without noise.
        corrupted: with noise, nothing put back.
    """

    heat_map: HeatMap
    clean: float
    corrupted: float


def trace(
    model: nn.Module,
    inputs: Mapping[str, Any],
    answer: Tensor | Sequence[int],
    subject: Indices,
    *,
    component: str = "block_output",
    layers: Layers = "all",
    positions: Sequence[int | Sequence[int]] | None = None,
    labels: Sequence[str] | None = None,
    window: int = 1,
    noise: float = 3.0,
    samples: int = 4,
    seed: int = 0,
    rows: int = 64,
) -> Trace:
    """Trace a fact through layers and positions.

    Args:
        model: a language model in evaluation mode.
        inputs: prompts of equal length, as the model takes them.
        answer: token id of each prompt's answer.
        subject: positions of the subject's tokens, whose embeddings get noise.
        component: what is put back.
        layers: the map's rows.
        positions: the map's columns, a position or a list of them each; None: every position.
        labels: names of the columns.
        window: so many neighbouring layers are put back together.
        noise: its standard deviation, in standard deviations of the embedding matrix.
        samples: noise draws for each prompt.
        seed: of the noise.
        rows: at most so many rows in one forward.
    """
    if samples < 1 or noise <= 0:
        raise ReftuneError(f"samples={samples}, noise={noise}: both must be greater than 0")
    clean = Run(inputs)
    prompts = batch_of(clean)
    embedding, path = _embedding(model)
    tiled = picked_inputs(clean, lambda tensor: tensor.repeat_interleave(samples, 0))
    there = Location(path, positions=_tiled(subject, samples))
    count = there.indices(prompts * samples, embedding.weight.device).shape[1]
    std = noise * float(embedding.weight.detach().float().std())
    shape = (prompts * samples, count, embedding.embedding_dim)
    blur = std * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    corrupted = Run(tiled, (Intervention(there, torch.add, (Source(blur.to(embedding.weight.detach())),)),))
    original = Run(tiled)

    length = next(iter(inputs.values())).shape[1]
    columns = list(range(length)) if positions is None else list(positions)
    numbers, cells = cells_of(model, original, component, layers, columns, window)
    metric = probability(torch.as_tensor(answer).repeat_interleave(samples))
    low, high = (float(sweep(model, run, [[]], metric).mean()) for run in (corrupted, original))
    per_row = sweep(model, corrupted, cells, metric, rows).view(len(numbers), len(columns), -1)
    title = f"probability of the answer with {component} put back"
    return Trace(HeatMap.of(per_row, numbers, labels or columns, title), high, low)


def _embedding(model: nn.Module) -> tuple[nn.Embedding, str]:
    find = getattr(model, "get_input_embeddings", None)
    embedding = find() if find is not None else None
    if not isinstance(embedding, nn.Embedding):
        raise ReftuneError(f"{type(model).__name__} has no input embeddings, so there is no subject to put noise on")
    return embedding, next(path for path, module in model.named_modules() if module is embedding)


def _tiled(positions: Indices, samples: int) -> Indices:
    own = isinstance(positions, Tensor) and positions.ndim
    return positions.repeat_interleave(samples, 0) if own and isinstance(positions, Tensor) else positions
