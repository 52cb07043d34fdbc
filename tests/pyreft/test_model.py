"""pyreft's model: what it edits, what it returns, what it leaves alone, and how it is saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

import reftune
import reftune.pyreft as pyreft
from reftune.errors import ReftuneError
from tests.tiny_models import CAUSAL, HIDDEN

IDS = torch.arange(3, 15).view(2, 6)
INPUTS = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}


def _config(
    layers: tuple[int, ...] = (1,), cls: Any = pyreft.LoreftIntervention, component: str = "block_output", **more: Any
) -> pyreft.ReftConfig:
    return pyreft.ReftConfig(
        representations=[
            {
                "layer": layer,
                "component": component,
                "low_rank_dimension": 4,
                "intervention": cls(embed_dim=HIDDEN, low_rank_dimension=4, dtype=torch.bfloat16),
                **more,
            }
            for layer in layers
        ]
    )


def _model(*args: Any, **more: Any) -> Any:
    return pyreft.get_reft_model(CAUSAL["llama"](), _config(*args, **more)).eval()


def _changed(model: Any, **arguments: Any) -> list[list[int]]:
    """Where the residual stream after the model's middle layer differs from the base model's."""
    inputs = {**INPUTS, "output_hidden_states": True}
    with torch.no_grad():
        before, after = model(inputs, output_original_output=True, **arguments)
    difference = (before.hidden_states[2] - after.hidden_states[2]).abs().amax(-1)
    return (difference > 1e-6).nonzero().tolist()


def test_a_call_returns_the_pair_of_base_and_edited_output() -> None:
    model = _model()
    base, edited = model(INPUTS, unit_locations={"base": 3})
    assert base is None and edited.logits.shape == (2, 6, 97)
    base, edited = model(INPUTS, unit_locations={"base": 3}, output_original_output=True)
    assert torch.equal(base.logits, model.model(**INPUTS).logits)
    assert not torch.equal(base.logits, edited.logits)


@pytest.mark.parametrize(
    ("unit_locations", "expected"),
    [
        (None, [[row, place] for row in range(2) for place in range(6)]),
        ({"base": 3}, [[0, 3], [1, 3]]),
        ({"sources->base": (None, [[[1], [4, 5]]])}, [[0, 1], [1, 4], [1, 5]]),
    ],
)
def test_exactly_the_named_tokens_are_edited(unit_locations: Any, expected: list[list[int]]) -> None:
    assert _changed(_model(), unit_locations=unit_locations) == expected


def test_each_intervention_has_locations_of_its_own() -> None:
    model = _model((1, 1))
    assert list(model.interventions) == [f"layer_1_comp_block_output_unit_pos_nunit_1#{n}" for n in range(2)]
    assert _changed(model, unit_locations={"base": [[[0]], [[5]]]}) == [[0, 0], [0, 5], [1, 0], [1, 5]]


def test_labels_give_the_loss() -> None:
    _, edited = _model()(INPUTS, unit_locations={"base": 3}, labels=IDS)
    expected = torch.nn.functional.cross_entropy(edited.logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    torch.testing.assert_close(edited.loss, expected)


def test_the_model_by_itself_stays_the_base_model() -> None:
    base = CAUSAL["llama"]()
    expected = base(**INPUTS).logits
    first = pyreft.get_reft_model(base, _config())
    second = pyreft.get_reft_model(base, _config((0,)))
    first(INPUTS, unit_locations={"base": 3})
    first.eval()
    assert torch.equal(base(**INPUTS).logits, expected)
    both = [m(INPUTS, unit_locations={"base": 3})[1].logits for m in (first, second, first)]
    assert torch.equal(both[0], both[2]) and not torch.equal(both[0], both[1])
    del second
    assert torch.equal(first(INPUTS, unit_locations={"base": 3})[1].logits, both[0])


def test_a_model_that_is_gone_leaves_nothing_behind() -> None:
    base = CAUSAL["llama"]()
    names = [name for name, _ in base.named_modules()]
    model = pyreft.get_reft_model(base, _config())
    assert len(list(base.named_modules())) > len(names)
    del model
    assert [name for name, _ in base.named_modules()] == names


def test_parameters_are_reported_in_pyrefts_words(capsys: Any) -> None:
    model = _model((0, 2))
    model.print_trainable_parameters()
    size = sum(p.numel() for p in CAUSAL["llama"]().parameters())
    assert capsys.readouterr().out == (
        "trainable intervention params: 520 || trainable model params: 0\n"
        f"model params: {size:,d} || trainable%: {100 * 520 / size}\n"
    )
    assert model.count_parameters() == 520


def _new(tokens: Tensor) -> list[list[int]]:
    return tokens[:, IDS.shape[1] :].tolist()


def test_generation_returns_a_pair_and_edits_the_prompt_once() -> None:
    model = _model()
    model.set_scale(30.0)
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    where = {"sources->base": (None, [[[5]]])}
    base, edited = model.generate(
        INPUTS, unit_locations=where, intervene_on_prompt=True, output_original_output=True, **options
    )
    assert _new(base) == _new(model.model.generate(**INPUTS, **options))
    assert _new(base) != _new(edited)
    ids = IDS  # by hand: whole rows without a cache, the prompt's last token edited in each
    for _ in range(5):
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with torch.no_grad():
            ids = torch.cat([ids, model(inputs, unit_locations=where)[1].logits[:, -1:].argmax(-1)], dim=1)
    assert _new(edited) == _new(ids)


def test_without_locations_the_prompt_or_the_generated_tokens_are_edited() -> None:
    model = _model()
    model.set_scale(3.0)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    base, after = model.generate(INPUTS, output_original_output=True, **options)
    _, before = model.generate(INPUTS, intervene_on_prompt=True, **options)
    assert [row[0] for row in _new(after)] == [row[0] for row in _new(base)]  # predicted by the unedited prompt
    assert _new(after) != _new(base) and _new(before) != _new(base) and _new(before) != _new(after)


def test_locations_without_intervening_on_the_prompt_are_refused() -> None:
    with pytest.raises(ReftuneError, match="pass intervene_on_prompt=True"):
        _model().generate(INPUTS, unit_locations={"base": 5}, max_new_tokens=2)


def test_dropout_is_off_while_generating_in_training_mode() -> None:
    edit = pyreft.LoreftIntervention(embed_dim=HIDDEN, low_rank_dimension=4, dropout=0.9)
    config = pyreft.ReftConfig({"layer": 1, "component": "block_output", "intervention": edit})
    model = pyreft.get_reft_model(CAUSAL["llama"](), config).train()
    rows = [_new(model.generate(INPUTS, intervene_on_prompt=True, max_new_tokens=4, do_sample=False)[1]) for _ in "abc"]
    assert rows[0] == rows[1] == rows[2]
    assert model.training


def test_subspaces_restrict_an_edit_to_parts_of_its_rotation() -> None:
    model = _model(subspace_partition=[[0, 1], [1, 4]])
    where = {"base": 3}

    def at(parts: list[int] | None) -> Tensor:
        inputs = {**INPUTS, "output_hidden_states": True}
        subspaces = None if parts is None else [[parts]]
        with torch.no_grad():
            return model(inputs, unit_locations=where, subspaces=subspaces)[1].hidden_states[2]

    with torch.no_grad():
        base = model.model(**INPUTS, output_hidden_states=True).hidden_states[2]
    torch.testing.assert_close(at([]), base)
    torch.testing.assert_close(at([0]) + at([1]) - base, at(None), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(at([0, 1]), at(None))
    assert not torch.allclose(at([0]), at([1]))


def test_a_scale_can_negate_one_intervention() -> None:
    model = _model((1, 1), cls=pyreft.LobireftIntervention)
    inputs = {**INPUTS, "output_hidden_states": True}
    first, second = model.interventions

    def at() -> Tensor:
        with torch.no_grad():
            return model(inputs, unit_locations={"base": 3})[1].hidden_states[2]

    both = at()
    model.set_scale(-1.0, second)
    difference = at()
    model.set_scale(0.0, second)
    torch.testing.assert_close(both + difference, 2 * at(), rtol=1e-4, atol=1e-5)
    with pytest.raises(ReftuneError, match="key='x'"):
        model.set_scale(1.0, "x")


@pytest.mark.parametrize("cls", [getattr(pyreft, n) for n in pyreft.__all__ if n.endswith("Intervention")])
def test_an_adapter_is_saved_and_comes_back_bit_for_bit(cls: Any, tmp_path: Path) -> None:
    model = _model((0, 2, 0, 2), cls=cls)
    model.save(tmp_path, positions="f2+l2")
    where = {"base": [[[0, 1]], [[0, 1]], [[4, 5]], [[4, 5]]]}
    expected = model(INPUTS, unit_locations=where)[1].logits
    again = pyreft.ReftModel.load(tmp_path, CAUSAL["llama"]()).eval()
    assert torch.equal(again(INPUTS, unit_locations=where)[1].logits, expected)
    through_peft = PeftModel.from_pretrained(CAUSAL["llama"](), str(tmp_path)).eval()
    assert torch.equal(through_peft(**INPUTS).logits, expected)


class Halved(pyreft.LoreftIntervention):
    def forward(self, base: Tensor, source: Any = None, subspaces: Any = None) -> Tensor:
        return base / 2


class Plain(pyreft.LoreftIntervention):
    def forward(self, h: Tensor) -> Tensor:
        return h / 2


class Renamed(pyreft.LoreftIntervention):
    """Computes as its parent does."""


@pytest.mark.parametrize("cls", [Halved, Plain])
def test_a_forward_of_ones_own_is_not_saved_as_what_it_is_not(cls: Any, tmp_path: Path) -> None:
    with pytest.raises(ReftuneError, match=f"{cls.__name__} computes by a forward of its own.*register_edit"):
        _model(cls=cls).save(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    _model(cls=Renamed).save(tmp_path / "adapter")


def test_options_that_pyreft_forgets_are_saved(tmp_path: Path) -> None:
    edit = pyreft.NoreftIntervention(embed_dim=HIDDEN, low_rank_dimension=4, dropout=0.25, act_fn="relu", add_bias=True)
    config = pyreft.ReftConfig({"component": "model.layers[1].mlp.output", "intervention": edit})
    pyreft.get_reft_model(CAUSAL["llama"](), config).save(tmp_path)
    again = pyreft.ReftModel.load(tmp_path, CAUSAL["llama"]())
    (back,) = again.interventions.values()
    assert isinstance(back, pyreft.NoreftIntervention)
    assert (back.dropout, back.act_fn, back.offset is not None) == (0.25, "relu", True)
    assert again.reft_config.representations[0].component == "model.layers.{layer}.mlp:output"


def test_edits_of_two_kinds_are_saved_side_by_side(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"layer": 0, "component": "block_output", "intervention": pyreft.LoreftIntervention(HIDDEN, 4)},
        {"layer": 2, "component": "mlp_output", "intervention": pyreft.NodireftIntervention(HIDDEN, 2)},
    ]
    model = pyreft.get_reft_model(CAUSAL["llama"](), pyreft.ReftConfig(rows)).eval()
    model.save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["edit0", "edit1"]
    again = pyreft.ReftModel.load(tmp_path, CAUSAL["llama"]()).eval()
    where = {"base": 5}
    assert torch.equal(again(INPUTS, unit_locations=where)[1].logits, model(INPUTS, unit_locations=where)[1].logits)


def test_lora_goes_on_training_under_an_edit() -> None:
    lora = get_peft_model(CAUSAL["llama"](), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model = pyreft.get_reft_model(lora, _config(component="base_model.model.model.layers[1].output", layer=None))
    model.train()
    model(INPUTS, unit_locations={"base": 3}, labels=IDS)[1].loss.backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert any("lora_B" in name for name in moved) and any("intervention" in name for name in moved)
    assert not any(p.requires_grad for n, p in model.named_parameters() if "lora_" not in n and "intervention" not in n)


def test_gradients_are_the_same_under_gradient_checkpointing() -> None:
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = pyreft.get_reft_model(CAUSAL["llama"](), _config((1, 2))).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(INPUTS, unit_locations={"base": 3}, labels=IDS)[1].loss.backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(plain, again)


def test_what_a_configuration_gets_wrong_is_said() -> None:
    edit = pyreft.LoreftIntervention(embed_dim=HIDDEN, low_rank_dimension=4)
    with pytest.raises(ReftuneError, match="name at least one place"):
        pyreft.ReftConfig(representations=[])
    with pytest.raises(ReftuneError, match=r"representations\[0\]: intervention=None: give an object"):
        pyreft.ReftConfig(representations={"layer": 1, "component": "block_output"})
    with pytest.raises(ReftuneError, match="low_rank_dimension=8, but its intervention has 4"):
        pyreft.ReftConfig({"layer": 1, "component": "block_output", "low_rank_dimension": 8, "intervention": edit})
    config = pyreft.ReftConfig({"layer": 9, "component": "block_output", "intervention": edit})
    with pytest.raises(ReftuneError, match="0 to 2"):
        pyreft.get_reft_model(CAUSAL["llama"](), config)
    peft = get_peft_model(CAUSAL["llama"](), reftune.ReftConfig(layers_to_transform=[1]))
    with pytest.raises(ReftuneError, match="carries a PEFT ReFT adapter"):
        pyreft.get_reft_model(peft, _config())


def test_the_hub_takes_and_gives_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    sent: list[tuple[str, Any]] = []

    class Api:
        def create_repo(self, name: str, exist_ok: bool = False) -> None:
            sent.append((name, exist_ok))

        def upload_folder(self, repo_id: str, folder_path: str) -> None:
            sent.append((repo_id, sorted(p.name for p in Path(folder_path).iterdir())))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, local_dir: str(tmp_path))
    model = _model()
    model.save(tmp_path, save_to_hf_hub=True, hf_repo_name="me/edit")
    assert sent == [("me/edit", True), ("me/edit", ["adapter_config.json", "adapter_model.safetensors"])]
    again = pyreft.ReftModel.load("me/edit", CAUSAL["llama"](), from_huggingface_hub=True)
    assert list(again.interventions) == list(model.interventions)
