"""Activation patching: which states of one run, put into another, bring its answer along?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from reftune.causal.heat_map import HeatMap
from reftune.causal.interchange import Inputs, Run, swap
from reftune.causal.locations import Location
from reftune.causal.reuse import batch_of
from reftune.causal.sweep import Metric, sweep
from reftune.engine.sites import find_sites
from reftune.errors import ReftuneError


def patch(
    model: nn.Module,
    base: Run | Inputs,
    source: Run | Inputs,
    metric: Metric,
    *,
    component: str = "block_output",
    layers: int | Sequence[int] | Literal["all"] = "all",
    positions: Sequence[int | Sequence[int]] | None = None,
    labels: Sequence[str] | None = None,
    window: int = 1,
    relative: bool = True,
    rows: int = 64,
    reuse: bool = True,
) -> HeatMap:
    """Put the source's state into the base run at every layer and position, one at a time.

    Args:
        model: in evaluation mode.
        base: the run that is changed.
        source: the run whose states are put in, of the same batch size.
        metric: of the output, for each row; see ``logit_difference`` and ``probability``.
        component: what is put in (``"block_output"``, ``"mlp_output"``, ``"attention_output"``, ``"head_output[3]"``).
        layers: the map's rows.
        positions: the map's columns, a position or a list of them each; None: every position of the base's inputs.
        labels: names of the columns (tokens, as a rule).
        window: so many neighbouring layers are put in together.
        relative: 0 is the base's metric and 1 the source's; otherwise the metric itself.
        rows: at most so many rows in one forward.
        reuse: whether layers below the change are reused.

    Returns:
        The heat map.

    Raises:
        ReftuneError: batches that differ in size, or a metric that base and source share.
    """
    base, source = (run if isinstance(run, Run) else Run(run) for run in (base, source))
    if batch_of(base) != batch_of(source):
        raise ReftuneError(f"the source has a batch of {batch_of(source)}, the base one of {batch_of(base)}")
    columns = list(range(_length(base))) if positions is None else list(positions)
    sites = find_sites(model, component, layers)  # type: ignore[arg-type]
    numbers = [site.layer for site in sites if site.layer is not None]
    count = len(sites[0].stack.block_paths) if sites[0].stack else len(sites)
    cells = [
        [swap(Location(component, near, column), source) for near in layer_window(layer, window, count)]
        for layer in numbers
        for column in columns
    ]
    found = sweep(model, base, cells, metric, rows, reuse)
    if relative:
        low, high = (sweep(model, run, [[]], metric)[0] for run in (base, source))
        if bool(((high - low).abs() < 1e-6).any()):
            raise ReftuneError("a row's metric is the same in base and source: relative=True has nothing to divide by")
        found = (found - low) / (high - low)
    per_row = found.view(len(numbers), len(columns), -1)
    names = list(labels) if labels is not None else [str(column) for column in columns]
    return HeatMap(per_row.mean(-1), [str(n) for n in numbers], names, per_row, f"{component} put in, one at a time")


def patch_heads(
    model: nn.Module,
    base: Run | Inputs,
    source: Run | Inputs,
    metric: Metric,
    *,
    layers: int | Sequence[int] | Literal["all"] = "all",
    position: int | Sequence[int] | str | None = None,
    relative: bool = True,
    rows: int = 64,
) -> HeatMap:
    """As ``patch``, for every attention head at one position (None: all of them): a map of layers x heads."""
    base, source = (run if isinstance(run, Run) else Run(run) for run in (base, source))
    numbers = [site.layer for site in find_sites(model, "head_output[0]", layers) if site.layer is not None]  # type: ignore[arg-type]
    heads = _head_count(model, numbers[0])
    cells = [
        [swap(Location(f"head_output[{head}]", layer, position), source)] for layer in numbers for head in range(heads)
    ]
    found = sweep(model, base, cells, metric, rows)
    if relative:
        low, high = (sweep(model, run, [[]], metric)[0] for run in (base, source))
        found = (found - low) / (high - low)
    per_row = found.view(len(numbers), heads, -1)
    names = [str(head) for head in range(heads)]
    return HeatMap(
        per_row.mean(-1), [str(n) for n in numbers], names, per_row, "attention heads put in, one at a time", "head"
    )


def logit_difference(answer: Tensor | Sequence[int], other: Tensor | Sequence[int], position: int = -1) -> Metric:
    """Logit of each row's answer minus that of another answer, at one column of the logits (the last, by default)."""
    right, wrong = torch.as_tensor(answer), torch.as_tensor(other)

    def metric(logits: Tensor) -> Tensor:
        last = logits[:, position].float() if logits.ndim == 3 else logits.float()
        row = torch.arange(len(last), device=last.device)
        return last[row, right.to(last.device)] - last[row, wrong.to(last.device)]

    return metric


def probability(answer: Tensor | Sequence[int], position: int = -1) -> Metric:
    """Probability of each row's answer at one column of the logits (the last, by default)."""
    right = torch.as_tensor(answer)

    def metric(logits: Tensor) -> Tensor:
        last = logits[:, position].float() if logits.ndim == 3 else logits.float()
        return last.softmax(-1)[torch.arange(len(last), device=last.device), right.to(last.device)]

    return metric


def _length(run: Run) -> int:
    inputs = run.inputs if isinstance(run.inputs, Tensor) else next(iter(run.inputs.values()))
    return inputs.shape[1]


def layer_window(layer: int, window: int, count: int) -> range:
    """The ``window`` layers around one, moved inwards at the ends."""
    if window < 1:
        raise ReftuneError(f"window={window}: at least one layer is put in")
    first = max(0, min(layer - (window - 1) // 2, count - window))
    return range(first, min(count, first + window))


def _head_count(model: nn.Module, layer: int) -> int:
    site = find_sites(model, "head_output[0]", layer)[0]
    whole = model.get_submodule(site.module_path)
    from reftune.engine.blocks import linear_features

    features = linear_features(whole)
    assert features is not None
    return features[0] // site.width
