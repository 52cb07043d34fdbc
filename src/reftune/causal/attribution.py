"""Attribution patching: activation patching to first order, every layer and position from one backward pass.

Putting the source's state s in the place of h changes a metric by about (s - h) . d metric / dh. Two forwards and one
backward give that number everywhere, where exact patching needs a forward for each place. Source: Nanda (2023); Syed et
al., "Attribution Patching Outperforms Automated Circuit Discovery" (arXiv 2310.10348). It is worst where the network
saturates; ``agreement`` measures how far it can be trusted on a model at hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from reftune.causal.heat_map import HeatMap
from reftune.causal.interchange import Inputs, Intervention, Run, call, intervene, read
from reftune.causal.locations import Location
from reftune.causal.patching import runs_alike
from reftune.causal.sweep import Metric, output_tensor, sweep
from reftune.causal.training import frozen
from reftune.engine.sites import Layers, find_sites
from reftune.errors import ReftuneError


class _Probe:
    """h + 0, whose gradient is that of h."""

    def __call__(self, h: Tensor) -> Tensor:
        self.delta = torch.zeros_like(h, requires_grad=True)
        return h + self.delta


def attribution_patch(
    model: nn.Module,
    base: Run | Inputs,
    source: Run | Inputs,
    metric: Metric,
    *,
    component: str = "block_output",
    layers: Layers = "all",
    positions: Sequence[int] | None = None,
    labels: Sequence[str] | None = None,
    relative: bool = True,
) -> HeatMap:
    """What ``reftune.causal.patching.patch`` would give, to first order.

    Args:
        model: in evaluation mode.
        base: the run that is changed; its rows have one length.
        source: the run whose states are put in.
        metric: of the output, for each row.
        component: what is put in.
        layers: the map's rows.
        positions: the map's columns; None: every position.
        labels: names of the columns.
        relative: 0 is the base's metric and 1 the source's.

    Returns:
        The estimated heat map.
    """
    base, source = runs_alike(base, source)
    numbers = [site.layer for site in find_sites(model, component, layers) if site.layer is not None]
    where = None if positions is None else list(positions)
    locations = [Location(component, layer, where) for layer in numbers]
    probes = [_Probe() for _ in locations]
    probing = [Intervention(location, probe) for location, probe in zip(locations, probes, strict=True)]
    with frozen(model):
        with torch.no_grad():
            there = read(model, source, *locations)
        first = len(base.interventions)
        with torch.enable_grad(), intervene(model, *base.interventions, *probing) as it:
            metric(output_tensor(call(model, base.inputs))).sum().backward()
            here = [it.collected(first + index).detach() for index in range(len(probes))]
        rows = []
        for s, h, probe in zip(there, here, probes, strict=True):
            assert probe.delta.grad is not None
            if s.shape != h.shape:
                raise ReftuneError(f"base and source differ in length: {h.shape[1]} and {s.shape[1]} positions")
            rows.append(((s - h) * probe.delta.grad.view_as(h)).sum(-1).mT)
        per_row = torch.stack(rows).float()
        if relative:
            low, high = (sweep(model, run, [[]], metric)[0] for run in (base, source))
            per_row = per_row / (high - low)
    columns = labels or where or range(per_row.shape[1])
    return HeatMap.of(per_row, numbers, columns, f"{component} put in, to first order")


@dataclass(frozen=True)
class Agreement:
    """How alike two heat maps of the same places are.

    Attributes:
        pearson: correlation of the values.
        spearman: correlation of their ranks.
        top: share of the greatest tenth of places that both have in common.
        slope: by how much the second grows where the first grows by one (least squares through zero).
    """

    pearson: float
    spearman: float
    top: float
    slope: float


def agreement(exact: HeatMap, estimated: HeatMap) -> Agreement:
    """Compare an estimate with exact patching, over every place."""
    if exact.values.shape != estimated.values.shape:
        shapes = tuple(exact.values.shape), tuple(estimated.values.shape)
        raise ReftuneError(f"heat maps of shapes {shapes[0]} and {shapes[1]} show different places")
    a, b = exact.values.double().flatten(), estimated.values.double().flatten()
    ranks = [x.argsort().argsort().double() for x in (a, b)]
    count = max(1, len(a) // 10)
    common = set(a.topk(count).indices.tolist()) & set(b.topk(count).indices.tolist())
    slope = float((a * b).sum() / (a * a).sum())
    return Agreement(_correlation(a, b), _correlation(*ranks), len(common) / count, slope)


def _correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])
