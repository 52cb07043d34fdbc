"""Directions against computations of their own, in float64."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression

from reftune.errors import ReftuneError
from reftune.steering.directions import find_directions, gap_in_deviations, separation

WIDTH = 12


def two_sides(rows: int = 30, others: int = 30, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    stretched = draw.normal(size=(WIDTH, WIDTH))
    one = draw.normal(size=(rows, WIDTH)) @ stretched + draw.normal(size=WIDTH)
    return one.astype(np.float32), (draw.normal(size=(others, WIDTH)) @ stretched).astype(np.float32)


def test_the_mean_direction_at_strength_one_is_the_difference_of_the_means() -> None:
    one, other = two_sides(others=17)
    wanted = one.astype(float).mean(0) - other.astype(float).mean(0)
    found = find_directions(one, other)
    assert found.vector == pytest.approx(wanted, rel=1e-9)
    assert np.linalg.norm(found.basis[0]) == pytest.approx(1, rel=1e-12)


def test_the_principal_component_of_pairs_is_scikit_learns_and_points_to_the_positive_side() -> None:
    one, other = two_sides()
    wanted = PCA(n_components=3, svd_solver="full").fit(one.astype(float) - other.astype(float)).components_
    found = find_directions(one, other, estimator="pca", rank=3, paired=True)
    assert np.abs(np.sum(found.basis * wanted, axis=1)) == pytest.approx(1, rel=1e-9)
    ahead = (one - other).astype(float) @ found.basis.T > 0
    assert (ahead.mean(0) >= 0.5).all()
    turned = find_directions(other, one, estimator="pca", rank=3, paired=True)
    assert turned.basis == pytest.approx(-found.basis, abs=1e-9)


def test_the_probe_is_scikit_learns() -> None:
    one, other = two_sides(others=21)
    states, labels = np.concatenate([one, other]).astype(float), [1] * len(one) + [0] * len(other)
    wanted = LogisticRegression(max_iter=10_000).fit(states, labels).coef_[0]
    found = find_directions(one, other, estimator="probe")
    assert found.basis[0] == pytest.approx(wanted / np.linalg.norm(wanted), abs=1e-6)


@pytest.mark.parametrize("estimator", ["mean", "pca", "probe"])
@pytest.mark.parametrize("paired", [True, False])
def test_further_directions_are_orthonormal_and_each_goes_as_far_as_the_means_lie_apart(
    estimator, paired: bool
) -> None:
    one, other = two_sides()
    found = find_directions(one, other, estimator=estimator, rank=4, paired=paired)
    assert found.basis @ found.basis.T == pytest.approx(np.eye(4), abs=1e-9)
    assert found.shift == pytest.approx(
        found.basis @ (one.astype(float).mean(0) - other.astype(float).mean(0)), rel=1e-9
    )


def test_separation_is_the_share_of_rows_in_order_and_half_where_there_is_nothing() -> None:
    one, other = two_sides()
    direction = find_directions(one, other)
    far, near = one.astype(float) @ direction.basis[0], other.astype(float) @ direction.basis[0]
    wanted = np.mean([[float(a > b) for b in near] for a in far])
    assert separation(one, other, direction) == pytest.approx(wanted)
    assert separation(one, one, direction) == pytest.approx(0.5)
    assert gap_in_deviations(one, one, direction) == pytest.approx(0, abs=1e-9)


def test_sides_that_are_the_same_and_too_many_directions_are_refused() -> None:
    one, other = two_sides(rows=5, others=5)
    with pytest.raises(ReftuneError, match="nothing tells them apart"):
        find_directions(one, one.copy())
    with pytest.raises(ReftuneError, match="rank=9"):
        find_directions(one, other, rank=9, paired=True)
