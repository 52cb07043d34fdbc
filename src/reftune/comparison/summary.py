"""What the runs say together: means over seeds, intervals, differences from the reference, and who is on a frontier."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from reftune.comparison.methods import Method
from reftune.comparison.results import RunResult
from reftune.comparison.runner import Comparison
from reftune.evaluation.intervals import Interval, PairedDifference, bootstrap_interval, paired_test
from reftune.evaluation.judging import Judge, accepted_share, load_judge

SIGNIFICANT = 0.05
LEAST_ROWS, LEAST_SEEDS = 20, 3
"""Held-out rows and seeds without which no method is called better or worse than another, whatever the p value."""


@dataclass(frozen=True)
class MethodSummary:
    """One method over its seeds.

    Attributes:
        method: the method.
        results: its runs, by seed.
        loss: held-out loss a supervised token, judged as the recipe says, mean over seeds, in nats.
        interval: of that mean, 95%, over held-out rows.
        seed_range: the lowest and highest seed.
        best_loss: mean over seeds of the best epoch's.
        difference: loss less the reference's, paired by rows; None for the reference itself.
        exact_match: mean share; None where nothing was generated.
        accepted: mean share of answers that the judge accepts; None without one.
        options: mean accuracy by norm (`acc`, `acc_norm`); empty without options.
        side_effects: figures of `evaluation.side_effects`, mean over seeds; empty where they were not measured.
        options_interval: of `acc`, 95%, over option rows.
        parameters: trainable ones.
        seconds: of training, mean.
        epoch_seconds: of one epoch, mean.
        memory: peak bytes, the largest of the seeds; None where it could not be told.
        adapter_bytes: on disk.
        frontier: which of `parameters`, `seconds` and `kl` no other method beats at a lower loss.
    """

    method: Method
    results: tuple[RunResult, ...]
    loss: float
    interval: Interval
    seed_range: Interval
    best_loss: float
    difference: PairedDifference | None
    exact_match: float | None
    accepted: float | None
    options: dict[str, float]
    options_interval: Interval | None
    side_effects: dict[str, float]
    parameters: int
    seconds: float
    epoch_seconds: float
    memory: int | None
    adapter_bytes: int
    frontier: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        """As the recipe calls it."""
        return self.method.name

    @property
    def kl(self) -> float:
        """Mean KL divergence from the base on neutral text, in nats a token; infinite where it was not measured."""
        return self.side_effects.get("kl", math.inf)

    @property
    def seeds(self) -> list[int]:
        """The seeds that are done."""
        return [result.seed for result in self.results]

    def curve(self) -> list[tuple[float, float, float, float]]:
        """(epoch, mean, lowest, highest) held-out loss, over seeds."""
        points = zip(*(result.curve for result in self.results), strict=False)
        return [(_mean(p)[0], _mean(p)[1], min(v for _, v in p), max(v for _, v in p)) for p in points]

    def train_curve(self) -> list[tuple[float, float]]:
        """(epoch, training loss), mean over seeds."""
        return [_mean(points) for points in zip(*(result.train_curve for result in self.results), strict=False)]


def summarise(comparison: Comparison) -> list[MethodSummary]:
    """One summary a method that has a result, in the recipe's order."""
    recipe = comparison.recipe
    reference = comparison.of(recipe.reference)
    theirs = _row_shares(reference, recipe.judge_by) if reference else None
    judge = None if recipe.judge is None else load_judge(recipe.judge)
    found: list[MethodSummary] = []
    for method in recipe.methods:
        results = comparison.of(method.name)
        if not results:
            continue
        difference = None
        if theirs is not None and method.name != recipe.reference:
            difference = paired_test(_row_shares(results, recipe.judge_by), theirs)
        found.append(_summary(method, results, recipe.judge_by, difference, judge))
    trained = [item for item in found if item.method.trains]
    on = {
        axis: _frontier(items, lambda item, axis=axis: float(getattr(item, axis)))
        for axis, items in {"parameters": trained, "seconds": trained, "kl": found}.items()
    }
    return [
        replace(item, frontier=frozenset(axis for axis, names in on.items() if item.name in names)) for item in found
    ]


def shortage(item: MethodSummary, reference: MethodSummary) -> str:
    """What two methods have too little of for a verdict, in words; empty where there is enough.

    Rows first: the p value of six rows can be 0.03 by the luck of one. The seeds are the fewer of the two methods';
    a method that no seed changes needs one.
    """
    rows = len(reference.results[0].row_tokens)
    seeds = min((len(each.results) for each in (item, reference) if each.method.seeded), default=LEAST_SEEDS)
    few_seeds = "one seed" if seeds == 1 else f"{seeds} seeds"
    return ", ".join(["too few rows"] * (rows < LEAST_ROWS) + [few_seeds] * (seeds < LEAST_SEEDS))


def _summary(
    method: Method,
    results: list[RunResult],
    judge_by: str,
    difference: PairedDifference | None,
    judge: Judge | None,
) -> MethodSummary:
    losses = [result.judged_loss(judge_by) for result in results]
    tokens = np.array(results[0].row_tokens)
    sums = np.mean([result.rows(judge_by).sums for result in results], axis=0)

    def a_token(drawn: np.ndarray) -> float:
        rows = drawn.astype(int)
        return float(sums[rows].sum() / max(tokens[rows].sum(), 1))

    right: dict[str, np.ndarray] = {
        norm: np.mean([result.options_right[norm] for result in results], axis=0) for norm in results[0].options_right
    }
    memory = [result.peak_memory_bytes for result in results if result.peak_memory_bytes is not None]
    matches = [result.exact_match for result in results if result.exact_match is not None]
    return MethodSummary(
        method=method,
        results=tuple(results),
        loss=_average(losses),
        interval=bootstrap_interval(np.arange(len(sums)), statistic=a_token),
        seed_range=Interval(min(losses), max(losses)),
        best_loss=_average([result.best_loss for result in results]),
        difference=difference,
        exact_match=_average(matches) if matches else None,
        accepted=_average([accepted_share(judge, result.answers) for result in results]) if judge else None,
        options={norm: float(values.mean()) for norm, values in right.items()},
        side_effects={
            name: _average([result.side_effects[name] for result in results]) for name in results[0].side_effects
        },
        options_interval=bootstrap_interval(right["acc"]) if right else None,
        parameters=results[0].trainable_parameters,
        seconds=_average([result.train_seconds for result in results]),
        epoch_seconds=_average([seconds for result in results for seconds in result.epoch_seconds] or [0.0]),
        memory=max(memory) if memory else None,
        adapter_bytes=results[0].adapter_bytes,
    )


def _row_shares(results: Sequence[RunResult], judge_by: str) -> np.ndarray:
    """A number a held-out row whose mean is the loss a token, averaged over seeds: what a paired test takes."""
    sums = np.mean([result.rows(judge_by).sums for result in results], axis=0)
    tokens = results[0].row_tokens
    return sums * len(tokens) / max(sum(tokens), 1)


def _frontier(summaries: list[MethodSummary], cost: Callable[[MethodSummary], float]) -> set[str]:
    """Methods that no other one beats in both: as cheap or cheaper at a lower loss."""
    return {
        item.name
        for item in summaries
        if not any(cost(other) <= cost(item) and other.loss < item.loss for other in summaries if other is not item)
    }


def _average(values: Sequence[float]) -> float:
    return float(np.mean(values))


def _mean(points: Sequence[Any]) -> tuple[float, float]:
    return _average([x for x, _ in points]), _average([y for _, y in points])
