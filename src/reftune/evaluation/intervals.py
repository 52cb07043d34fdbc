"""How sure a figure is: bootstrap intervals, and a paired test of a difference on the same examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import numpy as np

from reftune.errors import ReftuneError

Values: TypeAlias = "Sequence[float | int | bool] | np.ndarray"

_CELLS = 4_000_000  # numbers drawn at once: 32 MB of indices, whatever the number of examples


@dataclass(frozen=True)
class Interval:
    """A confidence interval, in the unit of the values."""

    low: float
    high: float


@dataclass(frozen=True)
class PairedDifference:
    """``ours - theirs`` on the same examples: its mean, its 95% interval, the two-sided p value of no difference."""

    mean: float
    interval: Interval
    p_value: float


def bootstrap_interval(
    values: Values,
    *,
    confidence: float = 0.95,
    samples: int = 2000,
    seed: int = 0,
    statistic: Callable[[np.ndarray], Any] | None = None,
) -> Interval:
    """The percentile bootstrap interval of a statistic of independent values (Efron and Tibshirani 1993, chapter 13).

    Args:
        values: One number (or right/wrong) an example.
        confidence: The share of resamples inside the interval, between 0 and 1.
        samples: How many resamples are drawn.
        seed: Of the resampling; the same seed gives the same interval.
        statistic: Maps a 1-D array of resampled values to a number; the mean when absent.

    Returns:
        The interval. A single value, or values that are all the same, give an interval of no width.

    Raises:
        ReftuneError: There are no values, one is not finite, or ``confidence`` or ``samples`` is out of range.
    """
    array = _array(values, "values")
    if not 0 < confidence < 1:
        raise ReftuneError(f"confidence={confidence}: give a share between 0 and 1, such as 0.95")
    if samples < 1:
        raise ReftuneError(f"samples={samples}: give at least 1")
    means = _resampled(array, samples, np.random.default_rng(seed), statistic)
    return _percentiles(means, confidence)


def paired_test(ours: Values, theirs: Values, *, samples: int = 10_000, seed: int = 0) -> PairedDifference:
    """Whether one model does better than another on the same examples.

    The p value is that of the paired permutation test: under no difference, which of the two results of an example
    belongs to which model is a coin's toss (Fisher 1935). It counts the observed arrangement as one of the
    permutations, so it is never 0. The interval is the bootstrap's, over examples.

    Args:
        ours: One number (or right/wrong) an example.
        theirs: The other model's, in the same order.
        samples: How many permutations, and how many resamples.
        seed: Of both.

    Returns:
        The difference; no difference on any example gives p = 1.

    Raises:
        ReftuneError: The two are not of one length, are empty, or hold a number that is not finite.
    """
    ours_array, theirs_array = _array(ours, "ours"), _array(theirs, "theirs")
    if len(ours_array) != len(theirs_array):
        raise ReftuneError(
            f"ours has {len(ours_array)} values and theirs {len(theirs_array)}: a paired test needs the results of "
            "both models on the same examples, in the same order"
        )
    if samples < 1:
        raise ReftuneError(f"samples={samples}: give at least 1")
    differences = ours_array - theirs_array
    rng = np.random.default_rng(seed)
    observed = differences.mean()
    # Ties are as extreme as the observed figure; without the slack, rounding would decide on them.
    threshold = abs(observed) - 1e-12 * max(1.0, float(np.abs(differences).max()))
    extreme = 0
    for size in _blocks(samples, len(differences)):
        signs = rng.integers(0, 2, (size, len(differences)), dtype=np.int8) * 2 - 1
        extreme += int((np.abs(signs @ differences) / len(differences) >= threshold).sum())
    return PairedDifference(
        mean=float(observed),
        interval=_percentiles(_resampled(differences, samples, rng, None), 0.95),
        p_value=(extreme + 1) / (samples + 1),
    )


def _array(values: Values, name: str) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or len(array) == 0:
        raise ReftuneError(f"{name} has shape {array.shape}: give one number an example, and at least one example")
    if not np.isfinite(array).all():
        raise ReftuneError(f"{name}[{int(np.argmin(np.isfinite(array)))}] is not a finite number")
    return array


def _blocks(samples: int, width: int) -> list[int]:
    size = max(1, _CELLS // width)
    return [min(size, samples - start) for start in range(0, samples, size)]


def _resampled(
    array: np.ndarray,
    samples: int,
    rng: np.random.Generator,
    statistic: Callable[[np.ndarray], Any] | None,
) -> np.ndarray:
    results: list[np.ndarray] = []
    for size in _blocks(samples, len(array)):
        drawn = array[rng.integers(0, len(array), (size, len(array)))]
        rows = drawn.mean(axis=1) if statistic is None else np.array([float(statistic(row)) for row in drawn])
        results.append(rows)
    return np.concatenate(results)


def _percentiles(figures: np.ndarray, confidence: float) -> Interval:
    tail = (1 - confidence) / 2
    low, high = cast("tuple[float, float]", tuple(np.nanquantile(figures, [tail, 1 - tail])))
    return Interval(float(low), float(high))
