"""Intervals and paired tests say what is known about a figure."""

from __future__ import annotations

from math import comb

import numpy as np
import pytest

from reftune.errors import ReftuneError
from reftune.evaluation.intervals import Interval, bootstrap_interval, paired_test


def test_one_value_and_constant_values_give_an_interval_of_no_width() -> None:
    assert bootstrap_interval([0.5]) == Interval(0.5, 0.5)
    assert bootstrap_interval([True] * 9) == Interval(1.0, 1.0)


def test_the_interval_of_a_share_is_near_the_normal_approximation() -> None:
    values = [1.0] * 60 + [0.0] * 40
    interval = bootstrap_interval(values, samples=4000)
    width = 1.96 * (0.6 * 0.4 / 100) ** 0.5
    assert interval.low == pytest.approx(0.6 - width, abs=0.02)
    assert interval.high == pytest.approx(0.6 + width, abs=0.02)


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(3)
    covered = 0
    for trial in range(200):
        interval = bootstrap_interval(rng.random(80) < 0.3, samples=400, seed=trial)
        covered += interval.low <= 0.3 <= interval.high
    assert 175 <= covered <= 200


def test_another_statistic_can_be_asked_for() -> None:
    values = list(range(101))
    interval = bootstrap_interval(values, statistic=np.median, samples=300)
    assert interval.low < 50 < interval.high and interval.high - interval.low < 50


def test_the_same_seed_gives_the_same_interval_and_another_seed_another() -> None:
    values = np.random.default_rng(0).normal(size=50)
    assert bootstrap_interval(values, seed=1) == bootstrap_interval(values, seed=1)
    assert bootstrap_interval(values, seed=1) != bootstrap_interval(values, seed=2)


def test_more_examples_than_fit_one_draw_are_drawn_in_parts() -> None:
    values = np.random.default_rng(0).normal(size=900_000)
    interval = bootstrap_interval(values, samples=9)
    assert -0.01 < interval.low < interval.high < 0.01


def test_no_difference_has_p_one() -> None:
    result = paired_test([True, False, True], [True, False, True])
    assert (result.mean, result.p_value, result.interval) == (0.0, 1.0, Interval(0.0, 0.0))


def test_the_paired_p_value_is_the_exact_sign_test_for_right_and_wrong() -> None:
    ours = [1] * 9 + [0] * 2 + [1] * 20
    theirs = [0] * 9 + [1] * 2 + [1] * 20
    result = paired_test(ours, theirs, samples=40_000)
    assert result.mean == pytest.approx(7 / 31)
    assert result.p_value == pytest.approx(2 * sum(comb(11, wins) for wins in range(3)) / 2**11, abs=0.008)
    assert result.interval.low > 0


def test_the_p_value_of_one_pair_is_not_zero() -> None:
    assert paired_test([1.0], [0.0], samples=100).p_value == 1.0


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: bootstrap_interval([]), "at least one example"),
        (lambda: bootstrap_interval([1.0, float("nan")]), r"values\[1\]"),
        (lambda: bootstrap_interval([1.0], confidence=95.0), "confidence=95.0"),
        (lambda: paired_test([1.0], [1.0, 0.0]), "ours has 1 values and theirs 2"),
    ],
)
def test_bad_values_are_named(call, words: str) -> None:
    with pytest.raises(ReftuneError, match=words):
        call()
