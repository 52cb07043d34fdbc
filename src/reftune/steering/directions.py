"""The directions in which two sets of hidden states differ, each layer for itself, in float64.

| estimator | direction | as in |
|---|---|---|
| `mean` | difference of the two means | CAA, arXiv 2312.06681, eq. 1 |
| `pca` | first principal component of the differences of pairs | repeng; RepE, arXiv 2310.01405 |
| `probe` | normal of a logistic regression between the two (L2, C = 1) | ITI, arXiv 2306.03341 |

Where rows are not paired, `pca` takes the states around the middle of the two means.

Whatever the estimator, a direction at strength 1 moves a state as far along it as the two means lie apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float

from reftune.errors import ReftuneError

Estimator = Literal["mean", "pca", "probe"]


@dataclass(frozen=True)
class Direction:
    """What tells the two sides apart at one layer.

    Attributes:
        basis: k orthonormal directions, the leading one first and pointing to the positive side.
        shift: how far apart the two means lie along each.
    """

    basis: Float[np.ndarray, "k width"]
    shift: Float[np.ndarray, " k"]

    @property
    def vector(self) -> Float[np.ndarray, " width"]:
        """What is added to a state at strength 1."""
        return self.shift @ self.basis


def find_directions(
    positive: Float[np.ndarray, "rows width"],
    negative: Float[np.ndarray, "others width"],
    *,
    estimator: Estimator = "mean",
    rank: int = 1,
    paired: bool = False,
) -> Direction:
    """The ``rank`` leading directions of one layer.

    Args:
        positive: states of the positive rows.
        negative: states of the negative rows.
        estimator: see the table above; directions after the first are principal components of what is left.
        rank: how many.
        paired: whether the rows belong together, one by one.

    Raises:
        ReftuneError: the two sides do not differ, or have fewer directions than were asked for.
    """
    one, other = np.asarray(positive, np.float64), np.asarray(negative, np.float64)
    gap = one.mean(0) - other.mean(0)
    middle = (one.mean(0) + other.mean(0)) / 2
    spread = one - other if paired else np.concatenate([one - middle, other - middle])
    spread = spread - spread.mean(0)
    if not np.linalg.norm(gap) > 1e-9 * (1 + np.linalg.norm(middle)):
        raise ReftuneError("The two sides have the same hidden states at this layer: nothing tells them apart.")
    most = min(len(spread) - 1, len(gap)) + (estimator != "pca")
    if rank > most:
        raise ReftuneError(f"rank={rank}: so few rows have at most {most} directions; give more rows or a lower rank.")
    basis = [] if estimator == "pca" else [_unit(gap if estimator == "mean" else probe_normal(one, other))]
    if len(basis) < rank:
        for kept in basis:
            spread = spread - np.outer(spread @ kept, kept)
        basis += list(np.linalg.svd(spread, full_matrices=False)[2][: rank - len(basis)])
    found = np.stack(basis)
    if estimator == "pca":
        found *= _signs(one @ found.T, other @ found.T, paired)[:, None]
    return Direction(found, found @ gap)


def separation(
    positive: Float[np.ndarray, "rows width"], negative: Float[np.ndarray, "others width"], direction: Direction
) -> float:
    """The chance that a positive row lies further along the leading direction than a negative one (AUC)."""
    one, other = (np.asarray(side, np.float64) @ direction.basis[0] for side in (positive, negative))
    return float((np.sign(one[:, None] - other[None, :]) + 1).mean() / 2)


def gap_in_deviations(
    positive: Float[np.ndarray, "rows width"], negative: Float[np.ndarray, "others width"], direction: Direction
) -> float:
    """The distance of the means along the leading direction in standard deviations of a side (Cohen's d)."""
    one, other = (np.asarray(side, np.float64) @ direction.basis[0] for side in (positive, negative))
    return float((one.mean() - other.mean()) / max(np.sqrt((one.var() + other.var()) / 2), 1e-12))


def _unit(vector: Float[np.ndarray, " width"]) -> Float[np.ndarray, " width"]:
    return vector / np.linalg.norm(vector)


def _signs(one: np.ndarray, other: np.ndarray, paired: bool) -> np.ndarray:
    """Which way each component points: where most pairs (or else the mean) of the positive side lie further."""
    ahead = (np.sign(one - other)).sum(0) if paired else one.mean(0) - other.mean(0)
    return np.where(ahead < 0, -1.0, 1.0)


def probe_normal(
    one: Float[np.ndarray, "rows width"], other: Float[np.ndarray, "others width"]
) -> Float[np.ndarray, " width"]:
    """The normal of a logistic regression between two sets of states, pointing to the first.

    Raises:
        ReftuneError: scikit-learn is not installed.
    """
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        raise ReftuneError(
            "A probe (--estimator probe, --when) needs scikit-learn: run `pip install scikit-learn`."
        ) from None
    states = np.concatenate([one, other])
    labels = np.repeat([1, 0], [len(one), len(other)])
    return LogisticRegression(max_iter=10_000).fit(states, labels).coef_[0]
