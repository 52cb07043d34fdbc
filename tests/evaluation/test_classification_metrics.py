"""GLUE's metrics against values worked out by hand, and against scikit-learn and SciPy where they are installed."""

from __future__ import annotations

import numpy as np
import pytest

from reftune.evaluation.classification_metrics import (
    accuracy,
    combined,
    f1,
    macro_f1,
    matthews,
    pearson,
    spearman,
)

GOLD, GUESS = np.array([1, 1, 1, 0, 0, 0, 0, 1]), np.array([1, 0, 1, 0, 1, 0, 0, 1])  # TP 3, FN 1, FP 1, TN 3


def test_binary_metrics_by_hand() -> None:
    assert accuracy(GUESS, GOLD) == 0.75
    assert f1(GUESS, GOLD) == pytest.approx(2 * 3 / (2 * 3 + 1 + 1))
    assert matthews(GUESS, GOLD) == pytest.approx((3 * 3 - 1 * 1) / (4 * 4 * 4 * 4) ** 0.5)
    assert macro_f1(GUESS, GOLD) == pytest.approx(0.75)
    assert combined(["accuracy", "f1"])(GUESS, GOLD) == pytest.approx(0.75)


def test_f1_is_of_class_one() -> None:
    assert f1(np.array([0, 0, 1]), np.array([0, 0, 0])) == 0.0
    assert f1(np.array([1, 1, 1]), np.array([0, 1, 1])) == pytest.approx(0.8)


def test_correlations_by_hand() -> None:
    assert pearson(np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0, 6.0])) == pytest.approx(1)
    assert spearman(np.array([1.0, 10.0, 100.0]), np.array([3.0, 2.0, 1.0])) == pytest.approx(-1)
    # Ranks 1.5, 1.5, 3 against 1, 2, 3.
    assert spearman(np.array([5.0, 5.0, 9.0]), np.array([1.0, 2.0, 3.0])) == pytest.approx(0.8660254)


def test_what_is_constant_has_no_correlation() -> None:
    constant, varied = np.ones(4), np.arange(4.0)
    assert pearson(constant, varied) == spearman(varied, constant) == 0.0
    assert matthews(np.zeros(4, dtype=int), np.array([0, 1, 0, 1])) == 0.0


def test_against_the_libraries() -> None:
    metrics = pytest.importorskip("sklearn.metrics", reason="pip install scikit-learn")
    stats = pytest.importorskip("scipy.stats", reason="pip install scipy")
    rng = np.random.default_rng(0)
    for classes in (2, 4):
        gold, guess = rng.integers(0, classes, 200), rng.integers(0, classes, 200)
        guess[:100] = gold[:100]
        assert matthews(guess, gold) == pytest.approx(metrics.matthews_corrcoef(gold, guess))
        assert macro_f1(guess, gold) == pytest.approx(metrics.f1_score(gold, guess, average="macro"))
        assert accuracy(guess, gold) == pytest.approx(metrics.accuracy_score(gold, guess))
        if classes == 2:
            assert f1(guess, gold) == pytest.approx(metrics.f1_score(gold, guess))
    gold = np.round(rng.random(200) * 5, 1)
    guess = np.round(gold + rng.normal(size=200), 1)
    assert pearson(guess, gold) == pytest.approx(stats.pearsonr(guess, gold)[0])
    assert spearman(guess, gold) == pytest.approx(stats.spearmanr(guess, gold)[0])
