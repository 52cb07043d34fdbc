"""Measure a classifier on labelled rows: GLUE's metrics, each with its bootstrap interval."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from reftune.data.classification import LabelScheme
from reftune.data.formats import LabelledText
from reftune.data.glue import GLUE
from reftune.errors import ReftuneError
from reftune.evaluation.classification_metrics import (
    CLASS_METRICS,
    COMBINED,
    METRICS,
    NUMBER_METRICS,
    Metric,
    combined,
)
from reftune.evaluation.intervals import Interval, bootstrap_interval
from reftune.inference.classifying import EditedClassifier, class_scores

_SAMPLES = 1000


@dataclass(frozen=True)
class Measures:
    """What a classifier is measured by.

    Attributes:
        functions: metrics by name.
        main: the one that chooses the checkpoint and stands for the task.
    """

    functions: dict[str, Metric]
    main: str

    def all(self, predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Every metric of predicted ids (or numbers) and true ones, both of shape (rows,)."""
        return {name: function(predicted, labels) for name, function in self.functions.items()}

    def interval(self, name: str, predicted: np.ndarray, labels: np.ndarray) -> Interval:
        """The 95% bootstrap interval of a metric, over rows."""
        function = self.functions[name]

        def resampled(rows: np.ndarray) -> float:
            index = rows.astype(np.int64)
            return function(predicted[index], labels[index])

        return bootstrap_interval(np.arange(len(labels)), samples=_SAMPLES, statistic=resampled)


@dataclass(frozen=True)
class ClassificationScore:
    """What a classifier scores.

    Attributes:
        rows: how many were scored.
        loss: mean cross-entropy in nats a row, or mean squared error where a number is predicted.
        metric: the main metric's name.
        score: its value.
        metrics: every metric by name.
        intervals: their 95% bootstrap intervals.
        predictions: class names, or numbers, in the order of the rows.
    """

    rows: int
    loss: float
    metric: str
    score: float
    metrics: dict[str, float]
    intervals: dict[str, Interval]
    predictions: list[str] | list[float]

    def as_dict(self) -> dict[str, Any]:
        """Everything but the predictions; intervals as [low, high]."""
        values = {name: value for name, value in asdict(self).items() if name != "predictions"}
        values["intervals"] = {name: [found.low, found.high] for name, found in self.intervals.items()}
        return values


def measures_for(scheme: LabelScheme, glue: str | None = None, metric: str | None = None) -> Measures:
    """The metrics of a GLUE task; else accuracy, macro F1 and Matthews correlation, or two correlations for a number.

    The main one is `metric` where given; else GLUE's score of the task (the mean of its metrics where it has two),
    accuracy, or the mean of both correlations.

    Raises:
        ReftuneError: a metric that these labels do not have.
    """
    known = NUMBER_METRICS if scheme.regression else CLASS_METRICS
    if metric and metric not in known:
        raise ReftuneError(f"metric={metric!r} does not measure these labels: choose one of {', '.join(known)}.")
    if metric == "f1" and len(scheme.names) > 2:
        raise ReftuneError(
            f"metric='f1' is of one class against the other, and there are {len(scheme.names)}: macro_f1?"
        )
    if glue:
        names = list(GLUE[glue].metrics)
    elif scheme.regression:
        names = list(NUMBER_METRICS)
    else:
        names = [name for name in CLASS_METRICS if name != "f1" or len(scheme.names) == 2]
    functions = {name: METRICS[name] for name in names}
    if scheme.regression or (glue and len(names) > 1):
        functions[COMBINED] = combined(names)
    main = metric or (COMBINED if COMBINED in functions else names[0])
    if main not in functions:
        functions[main] = METRICS[main]
    return Measures(functions, main)


def compute_metrics(measures: Measures, scheme: LabelScheme) -> Callable[[Any], dict[str, float]]:
    """What `Trainer` calls after each evaluation."""

    def compute(found: Any) -> dict[str, float]:
        outputs = found.predictions[0] if isinstance(found.predictions, tuple) else found.predictions
        return measures.all(decide(np.asarray(outputs), scheme), np.asarray(found.label_ids))

    return compute


def decide(outputs: np.ndarray, scheme: LabelScheme) -> np.ndarray:
    """The most likely class's id, or the number itself: (rows, outputs) to (rows,)."""
    if scheme.regression:
        return outputs.reshape(len(outputs)).astype(np.float64)
    return outputs.argmax(axis=1)


def evaluate_classification(
    classifier: EditedClassifier, rows: Sequence[LabelledText], batch_size: int = 32
) -> ClassificationScore:
    """Score a classifier on labelled rows, as its training run does.

    Args:
        classifier: see `load_classifier`.
        rows: see `read_texts`; not empty.
        batch_size: rows of one forward pass.

    Raises:
        ReftuneError: a label that is none of the classifier's classes.
    """
    scheme = classifier.scheme
    labels = np.array([_target(scheme, row) for row in rows])
    outputs = class_scores(classifier, rows, batch_size).astype(np.float64)
    measures = measures_for(scheme, classifier.glue, classifier.metric)
    predicted = decide(outputs, scheme)
    metrics = measures.all(predicted, labels)
    return ClassificationScore(
        rows=len(rows),
        loss=_loss(outputs, labels, scheme),
        metric=measures.main,
        score=metrics[measures.main],
        metrics=metrics,
        intervals={name: measures.interval(name, predicted, labels) for name in metrics},
        predictions=list(map(float, predicted)) if scheme.regression else [scheme.names[i] for i in predicted],
    )


def _target(scheme: LabelScheme, row: LabelledText) -> float | int:
    label = scheme.read(row).label
    return float(label) if scheme.regression else scheme.names.index(str(label))


def _loss(outputs: np.ndarray, labels: np.ndarray, scheme: LabelScheme) -> float:
    if scheme.regression:
        return float(((outputs[:, 0] - labels) ** 2).mean())
    highest = outputs.max(axis=1)
    total = highest + np.log(np.exp(outputs - highest[:, None]).sum(axis=1))
    return float((total - outputs[np.arange(len(labels)), labels]).mean())
