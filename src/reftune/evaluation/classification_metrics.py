"""GLUE's metrics on arrays of predictions and labels, cheap enough to be bootstrapped thousands of times."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

Metric = Callable[[np.ndarray, np.ndarray], float]

COMBINED = "combined"
"""The mean of a task's metrics, GLUE's score of a task that has two."""


def accuracy(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Share of equal class ids."""
    return float((predicted == labels).mean())


def f1(predicted: np.ndarray, labels: np.ndarray) -> float:
    """2 TP / (2 TP + FP + FN) of class 1, as in MRPC and QQP; 0 where that class is neither there nor predicted."""
    return _f1_of(1, predicted, labels)


def macro_f1(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Mean F1 over the classes that are there or are predicted."""
    classes = np.unique(np.concatenate([predicted, labels])).tolist()
    return float(np.mean([_f1_of(name, predicted, labels) for name in classes]))


def matthews(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Matthews correlation, for any number of classes (Gorodkin 2004); 0 where either side is constant."""
    classes = np.unique(np.concatenate([predicted, labels]))
    guessed = (predicted[:, None] == classes).sum(0).astype(float)
    true = (labels[:, None] == classes).sum(0).astype(float)
    count = float(len(labels))
    above = count * float((predicted == labels).sum()) - float(guessed @ true)
    below = (count**2 - float(guessed @ guessed)) * (count**2 - float(true @ true))
    return above / below**0.5 if below > 0 else 0.0


def pearson(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Pearson correlation; 0 where either side is constant."""
    left, right = predicted - predicted.mean(), labels - labels.mean()
    below = float(np.sqrt((left @ left) * (right @ right)))
    return float(left @ right) / below if below > 0 else 0.0


def spearman(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Pearson correlation of the ranks, ties sharing their mean rank; 0 where either side is constant."""
    return pearson(_ranks(predicted), _ranks(labels))


CLASS_METRICS: dict[str, Metric] = {"accuracy": accuracy, "f1": f1, "macro_f1": macro_f1, "matthews": matthews}
NUMBER_METRICS: dict[str, Metric] = {"pearson": pearson, "spearman": spearman}
METRICS: dict[str, Metric] = {**CLASS_METRICS, **NUMBER_METRICS}


def combined(names: Sequence[str]) -> Metric:
    """The mean of several metrics."""
    return lambda predicted, labels: float(np.mean([METRICS[name](predicted, labels) for name in names]))


def _f1_of(name: int, predicted: np.ndarray, labels: np.ndarray) -> float:
    guessed, true = predicted == name, labels == name
    below = float(guessed.sum() + true.sum())
    return 2 * float((guessed & true).sum()) / below if below else 0.0


def _ranks(values: np.ndarray) -> np.ndarray:
    _, index, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[index]
