"""Activation patching: which states of one run, put into another, bring its answer along?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from reftune.causal.heat_map import HeatMap
from reftune.causal.interchange import Inputs, Intervention, Run, swap
from reftune.causal.locations import Location
from reftune.causal.reuse import batch_of
from reftune.causal.sweep import Metric, sweep
from reftune.engine.blocks import linear_features
from reftune.engine.sites import Layers, Site, find_sites
from reftune.errors import ReftuneError


def patch(
    model: nn.Module,
    base: Run | Inputs,
    source: Run | Inputs,
    metric: Metric,
    *,
    component: str = "block_output",
    layers: Layers = "all",
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
    base, source = runs_alike(base, source)
    columns = list(range(_length(base))) if positions is None else list(positions)
    numbers, cells = cells_of(model, source, component, layers, columns, window)
    found = _measured(model, base, source, metric, cells, relative, rows, reuse)
    title = f"{component} put in, one at a time"
    return HeatMap.of(found.view(len(numbers), len(columns), -1), numbers, labels or columns, title)


def patch_heads(
    model: nn.Module,
    base: Run | Inputs,
    source: Run | Inputs,
    metric: Metric,
    *,
    layers: Layers = "all",
    position: int | Sequence[int] | str | None = None,
    relative: bool = True,
    rows: int = 64,
) -> HeatMap:
    """As ``patch``, for every attention head at one position (None: all of them): a map of layers x heads."""
    base, source = runs_alike(base, source)
    sites = find_sites(model, "head_output[0]", layers)
    numbers = [site.layer for site in sites if site.layer is not None]
    heads = _head_count(model, sites[0])
    cells = [
        [swap(Location(f"head_output[{head}]", layer, position), source)] for layer in numbers for head in range(heads)
    ]
    found = _measured(model, base, source, metric, cells, relative, rows)
    title = "attention heads put in, one at a time"
    return HeatMap.of(found.view(len(numbers), heads, -1), numbers, range(heads), title, "head")


def runs_alike(base: Run | Inputs, source: Run | Inputs) -> tuple[Run, Run]:
    """Both as runs, which must be of one batch size."""
    base, source = Run.of(base), Run.of(source)
    if batch_of(base) != batch_of(source):
        raise ReftuneError(f"the source has a batch of {batch_of(source)}, the base one of {batch_of(base)}")
    return base, source


def cells_of(
    model: nn.Module, source: Run, component: str, layers: Layers, columns: Sequence[int | Sequence[int]], window: int
) -> tuple[list[int], list[list[Intervention]]]:
    """The layers' numbers, and for each layer and column the swaps that put the source's states in around there."""
    sites = find_sites(model, component, layers)
    numbers = [site.layer for site in sites if site.layer is not None]
    count = len(sites[0].stack.block_paths) if sites[0].stack else len(sites)
    return numbers, [
        [swap(Location(component, near, column), source) for near in layer_window(layer, window, count)]
        for layer in numbers
        for column in columns
    ]


def _measured(
    model: nn.Module,
    base: Run,
    source: Run,
    metric: Metric,
    cells: Sequence[Sequence[Intervention]],
    relative: bool,
    rows: int,
    reuse: bool = True,
) -> Tensor:
    found = sweep(model, base, cells, metric, rows, reuse)
    if not relative:
        return found
    low, high = (sweep(model, run, [[]], metric)[0] for run in (base, source))
    if bool(((high - low).abs() < 1e-6).any()):
        raise ReftuneError("a row's metric is the same in base and source: relative=True has nothing to divide by")
    return (found - low) / (high - low)


def logit_difference(answer: Tensor | Sequence[int], other: Tensor | Sequence[int], position: int = -1) -> Metric:
    """Logit of each row's answer minus that of another answer, at one column of the logits (the last, by default)."""
    right, wrong = _token_ids("answer", answer), _token_ids("other", other)

    def metric(logits: Tensor) -> Tensor:
        last = _scores(logits, position)
        row = torch.arange(len(last), device=last.device)
        return last[row, right.to(last.device)] - last[row, wrong.to(last.device)]

    return metric


def probability(answer: Tensor | Sequence[int], position: int = -1) -> Metric:
    """Probability of each row's answer at one column of the logits (the last, by default)."""
    right = _token_ids("answer", answer)

    def metric(logits: Tensor) -> Tensor:
        last = _scores(logits, position)
        return last.softmax(-1)[torch.arange(len(last), device=last.device), right.to(last.device)]

    return metric


def _token_ids(name: str, given: Any) -> Int[Tensor, " batch"]:
    try:
        return torch.as_tensor(given, dtype=torch.long)
    except (TypeError, ValueError):
        raise ReftuneError(
            f"{name}={given!r}: give token ids, one for each row, such as tokenizer(' Paris').input_ids[:1]"
        ) from None


def _scores(logits: Tensor, position: int) -> Tensor:
    return logits[:, position].float() if logits.ndim == 3 else logits.float()


def _length(run: Run) -> int:
    inputs = run.inputs if isinstance(run.inputs, Tensor) else next(iter(run.inputs.values()))
    return inputs.shape[1]


def layer_window(layer: int, window: int, count: int) -> range:
    """The ``window`` layers around one, moved inwards at the ends."""
    if window < 1:
        raise ReftuneError(f"window={window}: at least one layer is put in")
    first = max(0, min(layer - (window - 1) // 2, count - window))
    return range(first, min(count, first + window))


def _head_count(model: nn.Module, site: Site) -> int:
    features = linear_features(model.get_submodule(site.module_path))
    assert features is not None
    return features[0] // site.width
