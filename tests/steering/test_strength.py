"""Edits of a direction, their divergence from the base, and the strength for a divergence."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from reftune.engine.sites import find_sites
from reftune.errors import ReftuneError
from reftune.evaluation.side_effects import AgainstBase
from reftune.steering.directions import Direction
from reftune.steering.strength import Steered, calibrated, edit_of, steered, strength_for
from reftune.training.prefix.switch import PrefixSwitch
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
    assert curve(found) == pytest.approx(1.7, rel=0.003)
    assert np.sign(found) == np.sign(start)


def test_a_divergence_out_of_reach_is_told() -> None:
    with pytest.raises(ReftuneError, match="no strength gives"):
        strength_for(5.0, lambda s: 3 * (1 - np.exp(-s * s)))


def test_a_calibrated_strength_is_checked_on_rows_that_did_not_find_it() -> None:
    class Half(AgainstBase):
        def __init__(self, slope: float, tokens: int):
            self.slope, self.tokens = slope, tokens

        def __call__(self, forward):
            return self.slope * forward() ** 2, 0.0

    class On(Steered):
        def at(self, strength: float):
            return lambda: strength

    on = On([], PrefixSwitch("off", None, []))
    strength, other = calibrated([Half(0.8, 30), Half(1.25, 10)], on, 0.3, -1.0)
    assert other == pytest.approx([0.3 * 0.8 / 1.25, 0.3 * 1.25 / 0.8], rel=0.01)
    assert strength == pytest.approx(-np.sqrt(0.3 / (0.75 * 0.8 + 0.25 * 1.25)), rel=0.005)
