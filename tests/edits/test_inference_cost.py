"""What inference costs: a rotation is made orthonormal at most once, and again only where something has changed it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model

import reftune
from reftune.edits import rotated, rotation
from tests.tiny_models import TINY, tiny_inputs

KINDS = [("loreft", "cholesky"), ("loreft", "householder"), ("direft_orthogonal", "householder")]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Every orthogonalisation by either parametrisation."""
    calls: list[str] = []

    def counting(name: str, call: Any) -> Any:
        return lambda *args: (calls.append(name), call(*args))[1]

    monkeypatch.setattr(rotation, "_orthonormalise", counting("cholesky", rotation._orthonormalise))
    monkeypatch.setattr(rotated, "householder", counting("householder", rotated.householder))
    yield calls


def model(method: str, parametrization: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    settings = {"layers_to_transform": [1], "positions": "all", "init": "paper", "task_type": "CAUSAL_LM", **settings}
    return get_peft_model(
        TINY["llama"](), reftune.ReftConfig(method=method, r=2, parametrization=parametrization, **settings)
    )


def step(tuned: Any) -> None:
    """One optimiser step, in training."""
    tuned.train()
    inputs = tiny_inputs("llama")
    labels = inputs["input_ids"].masked_fill(torch.arange(7) < 3, -100)
    tuned(**inputs, labels=labels).loss.backward()
    torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=1.0).step()


def generate(tuned: Any) -> torch.Tensor:
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return tuned.generate(**tiny_inputs("llama"), **options)


@pytest.mark.parametrize(("method", "parametrization"), KINDS)
def test_generate_makes_a_rotation_orthonormal_at_most_once(
    counted: list[str], method: str, parametrization: str
) -> None:
    tuned = model(method, parametrization)
    step(tuned)
    tuned.eval()
    counted.clear()
    generate(tuned)
    assert len(counted) <= 1
    generate(tuned)
    assert len(counted) <= 1


@pytest.mark.parametrize(("method", "parametrization"), KINDS)
@pytest.mark.parametrize("in_evaluation", [False, True])
def test_an_optimisers_step_shows_in_the_next_forward(method: str, parametrization: str, in_evaluation: bool) -> None:
    tuned = model(method, parametrization).eval()
    inputs = tiny_inputs("llama")
    with torch.no_grad():
        before = tuned(**inputs).logits
    step(tuned)
    if in_evaluation:  # a step without a change of mode
        tuned.eval()
        with torch.no_grad():
            tuned(**inputs)
            for name, parameter in tuned.named_parameters():
                if "rotation" in name or "reflectors" in name:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    tuned.eval()
    with torch.no_grad():
        after = tuned(**inputs).logits
        again = tuned(**inputs).logits
    with torch.enable_grad():
        recomputed = tuned(**inputs).logits.detach()
    assert not torch.allclose(before, after)
    assert torch.equal(after, again)
    torch.testing.assert_close(after, recomputed, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("method", "parametrization"), KINDS)
def test_loading_an_adapter_shows_in_the_next_forward(method: str, parametrization: str, tmp_path: Path) -> None:
    other = model(method, parametrization)
    step(other)
    other.eval()
    other.save_pretrained(tmp_path)
    tuned = model(method, parametrization).eval()
    inputs = tiny_inputs("llama")
    with torch.no_grad():
        tuned(**inputs)
        tuned.load_adapter(tmp_path, "other")
        tuned.set_adapter("other")
        torch.testing.assert_close(tuned(**inputs).logits, other(**inputs).logits, rtol=1e-5, atol=1e-6)
        tuned.set_adapter("default")
        state = {name: value.clone() for name, value in other.state_dict().items() if ".default." in name}
        tuned.load_state_dict(state, strict=False)
        torch.testing.assert_close(tuned(**inputs).logits, other(**inputs).logits, rtol=1e-5, atol=1e-6)
