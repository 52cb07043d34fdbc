"""The gate: open it is the edit, shut it is nothing, and it is kept as it was found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model

import reftune
from reftune.edits import GatedEdit, LobireftEdit, make_edit
from reftune.engine.hooks import Engine
from reftune.errors import ReftuneError
from tests.tiny_models import CAUSAL, HIDDEN, tiny_inputs

WIDTH, RANK = 12, 3


def gated(act_fn: str | None = None) -> GatedEdit:
    edit = make_edit("gated", WIDTH, RANK, init="paper", act_fn=act_fn)
    assert isinstance(edit, GatedEdit)
    edit.probe.normal_()
    edit.threshold.fill_(0.3)
    return edit


def test_an_open_gate_is_the_edit_to_the_bit_and_a_shut_one_the_base() -> None:
    edit, plain = gated().eval(), LobireftEdit(WIDTH, RANK, init="paper").eval()
    with torch.no_grad():
        edit.weight.zero_()
        edit.bias.copy_(plain.bias)
        edit.rotation.copy_(plain.rotation)
    h = torch.randn(50, WIDTH)
    is_open = h.double() @ edit.probe.double() > 0.3
    assert 5 < is_open.sum() < 45
    assert torch.equal(edit(h)[is_open], plain(h)[is_open])
    assert torch.equal(edit(h)[~is_open], h[~is_open])
    assert not torch.equal(edit(h), plain(h)) and not torch.equal(edit(h), h)
    assert torch.equal(edit.is_open(h), is_open)


def test_what_is_not_finite_where_the_gate_is_shut_does_not_come_through() -> None:
    edit, h = gated().eval(), torch.randn(9, WIDTH)
    with torch.no_grad():
        edit.weight.fill_(torch.inf)
        edit.threshold.fill_(1e6)
    assert torch.equal(edit(h), h)


@pytest.mark.parametrize("act_fn", [None, "tanh"])
def test_the_gradient_is_that_of_finite_differences_away_from_the_step(act_fn: str | None) -> None:
    edit = gated(act_fn).double().eval()
    h = torch.randn(8, WIDTH, dtype=torch.float64)
    h = h[(h @ edit.probe - edit.threshold).abs() > 1e-3].requires_grad_()
    assert 0 < edit.is_open(h).sum() < len(h)

    def run(h: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(edit, {"weight": weight, "bias": bias}, (h,))

    assert torch.autograd.gradcheck(run, (h, edit.weight, edit.bias))


def test_training_leaves_the_gate_as_it_was_found() -> None:
    edit = gated().train()
    before = edit.probe.clone(), edit.threshold.clone()
    optimiser = torch.optim.AdamW(edit.parameters(), lr=0.1)
    weight = edit.weight.detach().clone()
    for _ in range(3):
        edit(torch.randn(20, WIDTH)).square().sum().backward()
        optimiser.step()
    assert torch.equal(edit.probe, before[0]) and torch.equal(edit.threshold, before[1])
    assert not torch.equal(edit.weight, weight)


def test_a_gated_edit_has_no_folded_form() -> None:
    edit = gated()
    assert not edit.folds and not edit.is_linear
    with pytest.raises(ReftuneError, match="no folded form"):
        edit.fold()


def peft_of(**options: Any) -> Any:
    config = reftune.ReftConfig(
        method="gated", r=2, layers_to_transform=[1], init="paper", task_type="CAUSAL_LM", **options
    )
    return get_peft_model(CAUSAL["llama"](), config).eval()


def edits_of(model: Any) -> list[GatedEdit]:
    return [edit for edit in model.base_model.engine.edits("default").values() if isinstance(edit, GatedEdit)]


@pytest.mark.parametrize("positions", ["l1", "f1+l2", "prompt", "l1+generated", "all"])
@pytest.mark.parametrize("parametrization", ["cholesky", "householder"])
def test_a_gate_opens_token_by_token_and_comes_back_from_a_file(
    tmp_path: Path, positions: str, parametrization: str
) -> None:
    model, inputs = peft_of(positions=positions, parametrization=parametrization), tiny_inputs("llama")
    (edit,) = edits_of(model)

    def hidden() -> torch.Tensor:
        with torch.no_grad():
            return model(**inputs, output_hidden_states=True).hidden_states[2]

    with model.disable_adapter():
        base = hidden()
    everywhere = hidden()
    edit.probe.copy_(torch.randn(HIDDEN, generator=torch.Generator().manual_seed(0)))
    edited = (everywhere != base).any(-1)
    edit.threshold.fill_((base[edited] @ edit.probe).median().item())
    is_open = base @ edit.probe > edit.threshold
    expected = torch.where((is_open & edited).unsqueeze(-1), everywhere, base)
    assert (is_open & edited).any() == (edited.sum() > 1) and (~is_open & edited).any()
    assert torch.equal(hidden(), expected)
    model.save_pretrained(str(tmp_path))
    logits = model(**inputs).logits
    again = PeftModel.from_pretrained(CAUSAL["llama"](), str(tmp_path)).eval()
    assert torch.equal(edits_of(again)[0].probe, edit.probe)
    assert torch.equal(again(**inputs).logits, logits)
    assert Engine.of(again.get_base_model()) is not None


def test_rows_of_a_mixed_batch_have_gates_of_their_own() -> None:
    model, inputs = peft_of(positions="all"), tiny_inputs("llama", batch=3)
    model.add_adapter("shut", model.peft_config["default"])
    for edit in model.base_model.engine.edits("shut").values():
        edit.threshold.fill_(1.0)  # p = 0: never
    with torch.no_grad():
        mixed = model(**inputs, adapter_names=["default", "shut", "__base__"]).logits
        opened = model(**inputs).logits
        with model.disable_adapter():
            base = model(**inputs).logits
    torch.testing.assert_close(mixed[:1], opened[:1])
    torch.testing.assert_close(mixed[1:], base[1:])
    assert not torch.allclose(opened, base)


def test_a_gated_adapter_is_not_merged() -> None:
    with pytest.raises(ReftuneError, match="GatedEdit"):
        peft_of(positions="all").merge_and_unload()
