"""Several adapters on one model: scaled, negated, together, and in directions of their own within one rotation."""

from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor

import reftune
from reftune.errors import ReftuneError
from tests.tiny_models import CAUSAL, tiny_inputs


def _model(**options: Any) -> Any:
    config = reftune.ReftConfig(layers_to_transform=[1], init="paper", task_type="CAUSAL_LM", **options)
    return get_peft_model(CAUSAL["llama"](), config, adapter_name="first").eval()


def _hidden(model: Any, **arguments: Any) -> Tensor:
    """The residual stream after the edited layer."""
    with torch.no_grad():
        return model(**tiny_inputs("llama"), output_hidden_states=True, **arguments).hidden_states[2]


def _base_hidden(model: Any) -> Tensor:
    with model.disable_adapter():
        return _hidden(model)


@pytest.mark.parametrize("scale", [0.0, 0.5, -1.0, 2.0])
def test_a_scale_multiplies_what_an_edit_adds(scale: float) -> None:
    model = _model(r=4)
    base, once = _base_hidden(model), _hidden(model)
    assert not torch.allclose(base, once)
    model.base_model.set_scale("first", scale)
    torch.testing.assert_close(_hidden(model), base + scale * (once - base), rtol=1e-4, atol=1e-5)


def test_a_scale_for_an_unknown_adapter_is_refused() -> None:
    with pytest.raises(ReftuneError, match="'second' is not on this model, which has \\['first'\\]"):
        _model().base_model.set_scale("second", 2.0)


def test_two_active_adapters_edit_one_after_the_other() -> None:
    model = _model(r=2)
    model.add_adapter("second", reftune.ReftConfig(r=3, layers_to_transform=[1], init="paper"))
    base = _base_hidden(model)
    first = model.base_model.engine.edits("first")["model.layers.1"]
    second = model.base_model.engine.edits("second")["model.layers.1"]
    model.base_model.set_adapter(["first", "second"])
    expected = base.clone()
    expected[:, -1] = second(first(base[:, -1]))
    torch.testing.assert_close(_hidden(model), expected)
    model.base_model.set_adapter(["second", "first"])
    expected[:, -1] = first(second(base[:, -1]))
    torch.testing.assert_close(_hidden(model), expected)


def test_one_adapter_can_be_negated_while_another_acts() -> None:
    model = _model(r=2, method="lobireft")
    config = reftune.ReftConfig(r=3, layers_to_transform=[1], init="paper", method="lobireft")
    model.add_adapter("second", config)
    base, first = _base_hidden(model), _hidden(model)
    model.set_adapter("second")
    second = _hidden(model)
    model.base_model.set_adapter(["first", "second"])
    model.base_model.set_scale("second", -1.0)
    torch.testing.assert_close(_hidden(model), first - (second - base), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["loreft", "direft", "noreft", "consreft", "lobireft", "direft_orthogonal", "gated"])
def test_directions_restrict_an_edit_to_a_part_of_its_subspace(method: str) -> None:
    model = _model(r=4, method=method)
    edit: Any = model.base_model.engine.edits("first")["model.layers.1"]
    base, whole = _base_hidden(model), _hidden(model)
    basis = edit.coordinates(base)[1]
    kept = torch.tensor([[True, False, True, False], [False, True, False, True]])
    part = _hidden(model, intervention_directions=kept)
    rest = _hidden(model, intervention_directions=~kept)
    torch.testing.assert_close((part - base) + (rest - base), whole - base, rtol=1e-4, atol=1e-5)
    coordinates = torch.linalg.lstsq(basis.T, (part - base)[:, -1].T).solution.T  # exact: the change lies in the basis
    assert coordinates[~kept].abs().max() < 1e-4
    assert coordinates[kept].abs().max() > 1e-3


def test_only_the_chosen_directions_learn() -> None:
    model = _model(r=4, method="direft").train()
    inputs = tiny_inputs("llama")
    labels = inputs["input_ids"].clone()
    labels[:, :4] = -100
    directions = torch.tensor([[True, True, False, False]] * 2)
    model(**inputs, labels=labels, intervention_directions=directions).loss.backward()
    edit: Any = model.base_model.engine.edits("first")["model.layers.1"]
    assert edit.projection.grad[:2].abs().max() > 0
    assert edit.projection.grad[2:].abs().max() == 0
    assert edit.bias.grad[2:].abs().max() == 0


def test_directions_hold_in_generation_for_every_beam() -> None:
    model = _model(r=4, positions="all")
    model.base_model.set_scale("first", 4.0)
    inputs = {name: value.repeat(2, 1)[:2] for name, value in tiny_inputs("llama", batch=1).items()}
    directions = torch.tensor([[True] * 4, [False] * 4])
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "num_beams": 2, "pad_token_id": 0}
    mixed = model.generate(**inputs, **options, intervention_directions=directions)
    edited = model.generate(**inputs, **options)
    with model.disable_adapter():
        base = model.generate(**inputs, **options)
    assert mixed[0].tolist() == edited[0].tolist()
    assert mixed[1].tolist() == base[1].tolist()
    assert edited.tolist() != base.tolist()


def test_directions_of_another_rank_are_refused() -> None:
    with pytest.raises(ReftuneError, match="intervention_directions are 3 a row; LoreftEdit at this site has r=4"):
        _hidden(_model(r=4), intervention_directions=torch.ones(2, 3))


def test_a_mask_by_adapter_name_leaves_the_other_adapters_at_their_positions() -> None:
    model = _model(r=2)
    model.add_adapter("second", reftune.ReftConfig(r=2, layers_to_transform=[1], init="paper", positions="f1"))
    model.base_model.set_adapter(["first", "second"])
    base = _base_hidden(model)
    mask = torch.zeros(2, 7, dtype=torch.bool)
    mask[0, 3] = mask[1, 5] = True
    changed = (_hidden(model, intervention_mask={"first": mask}) - base).abs().amax(-1) > 1e-6
    expected = mask.clone()
    expected[:, 0] = True
    assert changed.tolist() == expected.tolist()


def test_the_position_generated_edits_what_follows_the_prompt_alone() -> None:
    model = _model(r=4, positions="generated")
    base = _base_hidden(model)
    changed = (_hidden(model, prompt_lengths=torch.tensor([2, 5])) - base).abs().amax(-1) > 1e-6
    assert changed.sum(-1).tolist() == [5, 2]
    inputs = tiny_inputs("llama", batch=1)
    model.base_model.set_scale("first", 4.0)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    edited = model.generate(**inputs, **options)[0].tolist()
    with model.disable_adapter():
        plain = model.generate(**inputs, **options)[0].tolist()
    assert edited[7] == plain[7]  # the first new token is predicted by the prompt
    assert edited != plain


def test_an_edit_that_writes_its_change_alone_works_but_has_no_directions() -> None:
    class Shift(reftune.Edit):
        """h + 1."""

        def change(self, h: Tensor) -> Tensor:
            return torch.ones_like(h)

        def reset_parameters(self) -> None:
            """There are none."""

    model = _model(r=2, method=Shift)
    torch.testing.assert_close(_hidden(model)[:, -1], _base_hidden(model)[:, -1] + 1)
    with pytest.raises(ReftuneError, match="Shift has no directions to choose from"):
        _hidden(model, intervention_directions=torch.ones(2, 2))
