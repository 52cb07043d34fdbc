"""Edits of a direction, their divergence from the base, and the strength for a divergence."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from reftune.engine.sites import find_sites
from reftune.errors import ReftuneError
from reftune.evaluation.side_effects import AgainstBase
from reftune.steering.directions import Direction
from reftune.steering.strength import Effect, Neutral, edit_of, steered, strength_for
from tests.tiny_models import CAUSAL

WIDTH = 32


def direction(rank: int = 2, size: float = 3.0) -> Direction:
    draw = np.random.default_rng(0)
    basis = np.linalg.qr(draw.normal(size=(WIDTH, rank)))[0].T
    return Direction(basis, size * draw.normal(size=rank))


def test_the_edit_adds_the_vector_times_the_strength_and_removal_projects_it_out() -> None:
    found, h = direction(), torch.randn(5, WIDTH, dtype=torch.float64)
    wanted = h + -1.5 * torch.from_numpy(found.vector)
    assert torch.allclose(edit_of(found, -1.5)(h), wanted, atol=1e-6)
    basis = torch.from_numpy(found.basis)
    assert torch.allclose(edit_of(found, 1.0, remove=True)(h), h - h @ basis.T @ basis, atol=1e-6)


def test_divergence_and_loss_are_those_of_plain_forwards() -> None:
    model = CAUSAL["llama"]().double().requires_grad_(False)
    site = find_sites(model, "block_output", [1])[0]
    draw = torch.Generator().manual_seed(1)
    rows = []
    for prompt, total in [(3, 8), (5, 7), (2, 12)]:
        ids = torch.randint(3, 90, (total,), generator=draw).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:], "prompt_length": prompt})

    def plain(added: torch.Tensor | None) -> list[torch.Tensor]:
        answers = []
        for row in rows:

            def edit(_m, _a, out, row=row):
                hidden = (out[0] if isinstance(out, tuple) else out).clone()
                hidden[0, row["prompt_length"] - 1 :] += added
                return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

            handle = model.get_submodule(site.module_path).register_forward_hook(edit) if added is not None else None
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
            if handle is not None:
                handle.remove()
            answers.append(logits[row["prompt_length"] - 1 : -1].log_softmax(-1))
        return answers

    found = direction()
    against = AgainstBase(model, rows, 0, batch_size=2)  # type: ignore[arg-type]
    with steered(model, {site: found}, "l1+generated", 0.7):
        kl, loss = against()
    base, now = plain(None), plain(0.7 * torch.from_numpy(found.vector))
    tokens = sum(len(one) for one in base)
    wanted = sum((b.exp() * (b - n)).sum() for b, n in zip(base, now, strict=True)) / tokens
    nll = sum(
        -n[range(len(n)), row["input_ids"][row["prompt_length"] :]].sum() for n, row in zip(now, rows, strict=True)
    )
    assert kl == pytest.approx(float(wanted), rel=1e-4)
    assert kl > 1e-3
    assert loss == pytest.approx(float(nll) / tokens, rel=1e-5)
    assert against()[0] == pytest.approx(0, abs=1e-9)  # and the model is the base again
    with steered(model, {site: found}, "l1+generated") as on:  # what the edit leaves alone computed once: the same
        once = AgainstBase(model, rows, 0, 2, on.at(0.0))  # type: ignore[arg-type]
        assert once(forward=on.at(0.7)) == pytest.approx((kl, loss), rel=1e-6)
        assert once.base_loss == pytest.approx(against.base_loss, rel=1e-9)
        assert on.prefixes.status == "on"


@pytest.mark.parametrize("start", [1.0, -1.0, 50.0, 1e-3])
@pytest.mark.parametrize(
    "curve", [lambda s: s**2, lambda s: min(abs(s), 4.0) ** 1.3, lambda s: 3 * (1 - np.exp(-s * s))]
)
def test_the_strength_for_a_divergence(curve, start: float) -> None:
    found = strength_for(1.7, curve, start)
    assert curve(found) == pytest.approx(1.7, rel=0.011)
    assert np.sign(found) == np.sign(start)


def test_a_divergence_out_of_reach_is_told() -> None:
    with pytest.raises(ReftuneError, match="no strength gives"):
        strength_for(5.0, lambda s: 3 * (1 - np.exp(-s * s)))


def random_rows(count: int) -> list[dict[str, object]]:
    draw = torch.Generator().manual_seed(2)
    rows = []
    for _ in range(count):
        prompt, answer = (int(torch.randint(2, 7, (), generator=draw)) for _ in range(2))
        ids = torch.randint(3, 90, (prompt + answer,), generator=draw).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:], "prompt_length": prompt})
    return rows


@pytest.mark.parametrize("start", [1.0, -30.0])
def test_a_calibrated_strength_its_error_and_its_check_on_rows_that_did_not_find_it(start: float) -> None:
    model = CAUSAL["llama"]().double().requires_grad_(False)
    site, rows, wanted = find_sites(model, "block_output", [1])[0], random_rows(45), 0.02
    with steered(model, {site: direction()}, "l1+generated", rows=rows) as on:  # type: ignore[arg-type]
        effect, crossed = Neutral(model, rows, 0, 2).calibrated(on, wanted, start)  # type: ignore[arg-type]

        def against(some) -> AgainstBase:
            return AgainstBase(model, some, 0, 45, on.at(0.0))

        whole, halves = against(rows), [against(rows[::2]), against(rows[1::2])]
        kls, losses = whole.by_row(forward=on.at(effect.strength))
        exact = [
            strength_for(wanted, lambda at, half=half: half(forward=on.at(at))[0], start, tolerance=1e-5)
            for half in halves
        ]
        on_the_other = [half(forward=on.at(at))[0] for half, at in zip(halves, reversed(exact), strict=True)]
    tokens = np.array([len(row["input_ids"]) - row["prompt_length"] for row in rows])  # type: ignore[arg-type, operator]
    assert np.sign(effect.strength) == np.sign(start)
    kl, error, loss = effect.told
    assert kls.sum() / tokens.sum() == pytest.approx(wanted, rel=1e-3)
    assert (kl, loss) == pytest.approx((wanted, losses.sum() / tokens.sum()), rel=1e-3)
    assert effect.base_loss == pytest.approx(whole.base_loss, rel=1e-6)
    assert crossed == pytest.approx(on_the_other, rel=5e-3)  # 20% apart; each half grows with a power of its own
    draw = np.random.default_rng(0).integers(0, 45, (4000, 45))  # the bootstrap of the mean over rows
    assert error == pytest.approx(np.std(kls[draw].sum(1) / tokens[draw].sum(1)), rel=0.1)


def test_one_neutral_row_has_no_standard_error() -> None:
    effect = Effect(1.0, np.array([4]), np.array([0.4]), np.array([8.0]), 1.9)
    assert effect.told == (0.1, None, 2.0)
