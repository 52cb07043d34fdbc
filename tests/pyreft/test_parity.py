"""What pyreft 0.1.0 itself computed (benchmarks/parity_pyreft wrote the golden files) is what comes out here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.parity_pyreft import cases, ours

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("name", cases.GOLDEN)
def test_an_adapter_that_pyreft_saved_gives_its_logits(name: str) -> None:
    expected = ours.expected_logits(GOLDEN)[name]
    assert (ours.logits_of(name, GOLDEN) - expected).abs().max() < 1e-5
    ids = torch.from_numpy(cases.tokens(list(cases.CASES).index(name), 2, 7))
    with torch.no_grad():
        assert (ours.tiny_model()(input_ids=ids).logits - expected).abs().max() > 0.05  # the edits do something


def test_twenty_prompts_are_continued_as_pyreft_continued_them() -> None:
    record = ours.expected_generations(GOLDEN)["tiny"]
    assert len(record["prompts"]) == 20
    found = ours.generations_of(
        GOLDEN / "generation", ours.tiny_model(), cases.CASES["loreft_untied"], record["prompts"], 12
    )
    assert found == record["tokens"]


def test_thirty_steps_of_training_give_pyrefts_loss_curve() -> None:
    expected, found = ours.expected_losses(GOLDEN), ours.loss_curve(GOLDEN, "householder")
    assert len(expected) == 30
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) < 1e-4
    assert expected[0] - min(expected) > 0.5  # it learned


def test_the_default_parametrization_starts_alike_and_learns_as_much() -> None:
    expected, found = ours.expected_losses(GOLDEN), ours.loss_curve(GOLDEN, "cholesky")
    assert abs(found[0] - expected[0]) < 1e-5
    assert found[0] - min(found) > 0.8 * (expected[0] - min(expected))
