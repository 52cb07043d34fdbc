"""One name, one adapter: what a second one under a name does, what a refusal keeps, and what a deleted one leaves."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.utils import load_peft_weights, set_peft_model_state_dict
from torch import Tensor, nn

import reftune
from reftune.engine.hooks import Engine
from tests.tiny_models import TINY, tiny_inputs

INPUTS = tiny_inputs("llama")
pytestmark = pytest.mark.filterwarnings(
    "ignore:You are trying to modify a model with PEFT for a second time",
    "ignore:Already found a `peft_config` attribute",
    "ignore:Adapter .* was active which is now deleted",
)


def config(**changes: Any) -> reftune.ReftConfig:
    settings = {"r": 2, "layers_to_transform": [1], "positions": "f2+l2", "init": "paper", "task_type": "CAUSAL_LM"}
    return reftune.ReftConfig(**{**settings, **changes})


SECOND: dict[str, dict[str, Any]] = {
    "other layers": {"layers_to_transform": [0, 2]},
    "one layer shared": {"layers_to_transform": [0, 1]},
    "other positions": {"positions": "all"},
    "tied": {"share_weights": True},
    "other rank": {"r": 3},
    "other method": {"method": "direft"},
    "other component": {"component": "mlp_output"},
    "without a head": {"modules_to_save": None},
}
FIRST = {"share_weights": False, "modules_to_save": ["lm_head"]}


def base() -> Any:
    return TINY["llama"]()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**INPUTS).logits


def shake(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn(parameter.shape, generator=generator) * 0.3


def first_one() -> Any:
    model = get_peft_model(base(), config(**FIRST))
    shake(model)
    return model.eval()


def saved(folder: Path, **changes: Any) -> Path:
    """A trained adapter's folder."""
    model = get_peft_model(base(), config(**changes))
    shake(model)
    model.save_pretrained(str(folder))
    return folder


MAKE: dict[str, Callable[[Any, Any], Any]] = {
    "get_peft_model": get_peft_model,
    "get_peft_model on the PeftModel": lambda model, one: get_peft_model(PEFT[model], one),
    "inject_adapter_in_model": lambda model, one: inject_adapter_in_model(one, model),
}
PEFT: dict[Any, Any] = {}
"""The `PeftModel` over a base model, where a test makes one."""


@pytest.mark.parametrize("change", SECOND)
@pytest.mark.parametrize("make", MAKE)
def test_a_second_adapter_of_a_name_replaces_the_first_whole(change: str, make: str, tmp_path: Path):
    one = first_one()
    model = one.get_base_model()
    PEFT[model] = one
    second = config(**{"modules_to_save": ["lm_head"], **SECOND[change]})
    torch.manual_seed(2)
    again = MAKE[make](model, second)
    torch.manual_seed(2)
    fresh = get_peft_model(base(), second)
    assert Engine.of(model) is not None
    assert torch.equal(logits(again), logits(fresh.eval()))
    trained = {n.removeprefix("base_model.model."): p.shape for n, p in again.named_parameters() if p.requires_grad}
    expected = {n.removeprefix("base_model.model."): p.shape for n, p in fresh.named_parameters() if p.requires_grad}
    assert trained == expected
    shake(one)  # the PeftModel of the first goes on with the second
    one.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(base(), str(tmp_path))), logits(one))
    assert torch.equal(logits(one.unload()), logits(base()))


@pytest.mark.parametrize("change", SECOND)
def test_a_second_from_pretrained_is_the_folder_that_it_was_given(change: str, tmp_path: Path):
    folder = saved(tmp_path, **SECOND[change])
    model = first_one().get_base_model()
    again = PeftModel.from_pretrained(model, str(folder))
    assert torch.equal(logits(again), logits(PeftModel.from_pretrained(base(), str(folder))))


def _other_base(folder: Path) -> None:
    get_peft_model(TINY["gpt2"](), config()).save_pretrained(str(folder))


def _incomplete(folder: Path) -> None:
    saved(folder / "more", layers_to_transform=[0])
    saved(folder)
    (folder / "more" / "adapter_model.safetensors").rename(folder / "adapter_model.safetensors")


def _cut_off(folder: Path) -> None:
    file = saved(folder) / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])


def _without_the_head(folder: Path) -> None:
    saved(folder / "more")
    saved(folder, modules_to_save=["lm_head"])
    (folder / "more" / "adapter_model.safetensors").rename(folder / "adapter_model.safetensors")


ADD: dict[str, Callable[[Any, Path], Any]] = {
    "from_pretrained": lambda peft, folder: PeftModel.from_pretrained(peft.get_base_model(), str(folder)),
    "from_pretrained, another name": lambda peft, folder: PeftModel.from_pretrained(
        peft.get_base_model(), str(folder), adapter_name="other"
    ),
    "load_adapter": lambda peft, folder: peft.load_adapter(str(folder), "default"),
    "load_adapter, another name": lambda peft, folder: peft.load_adapter(str(folder), "other"),
}


def as_it_was(model: Any) -> dict[str, Any]:
    """Everything that a refusal must keep."""
    return {
        "logits": logits(model).tolist(),
        "modules": [name for name, _ in model.named_modules()],
        "trained": [name for name, p in model.named_parameters() if p.requires_grad],
        "configs": {name: one.to_dict() for name, one in model.peft_config.items()},
        "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()),
    }


@pytest.mark.parametrize("spoil", [_other_base, _incomplete, _cut_off, _without_the_head])
@pytest.mark.parametrize("add", ADD)
def test_a_refused_folder_keeps_the_adapters_that_are_there(add: str, spoil: Callable[[Path], None], tmp_path: Path):
    spoil(tmp_path)
    peft = first_one()
    before = as_it_was(peft)
    with pytest.raises(Exception):  # noqa: B017 (PEFT's own errors too)
        ADD[add](peft, tmp_path)
    assert as_it_was(peft) == before
    assert torch.equal(logits(peft.unload()), logits(base()))


def test_a_refused_first_adapter_leaves_the_base_model_as_it_was(tmp_path: Path):
    _incomplete(tmp_path)
    model = base()
    with pytest.raises(reftune.ReftuneError, match="no tensor"):
        PeftModel.from_pretrained(model, str(tmp_path))
    assert nothing_of_ours(model)


@pytest.mark.parametrize("change", [{"layers_to_transform": [9]}, {"r": 99}, {"component": "nowhere"}])
@pytest.mark.parametrize("make", MAKE)
def test_a_refused_configuration_keeps_the_adapter_of_that_name(make: str, change: dict[str, Any]):
    peft = first_one()
    PEFT[peft.get_base_model()] = peft
    before = as_it_was(peft)
    with pytest.raises(reftune.ReftuneError):
        MAKE[make](peft.get_base_model(), config(**change))
    assert as_it_was(peft) == before


def test_after_a_refusal_transformers_adds_an_adapter_as_if_it_had_not_been():
    model = base()
    with pytest.raises(reftune.ReftuneError, match="layers_to_transform"):
        model.add_adapter(config(layers_to_transform=[40]))
    assert nothing_of_ours(model)
    _by_transformers(model, ["default"])


@pytest.mark.parametrize("change", [name for name in SECOND if name not in ("without a head", "tied")])
def test_loading_another_adapter_into_a_name_is_refused_with_the_way_out(change: str, tmp_path: Path):
    folder = saved(tmp_path / "second", **SECOND[change])
    own = saved(tmp_path / "first", **FIRST)
    peft = PeftModel.from_pretrained(base(), str(own))
    before = as_it_was(peft)
    with pytest.raises(reftune.ReftuneError, match=r"delete_adapter\('default'\)"):
        peft.load_adapter(str(folder), "default")
    assert as_it_was(peft) == before
    peft.load_adapter(str(own), "default")
    assert torch.equal(logits(peft), torch.tensor(before["logits"]))
    peft.delete_adapter("default")
    peft.load_adapter(str(folder), "default")
    assert torch.equal(logits(peft), logits(PeftModel.from_pretrained(base(), str(folder))))


def test_a_configuration_given_with_a_folder_is_taken_instead_of_its_own(tmp_path: Path):
    folder = saved(tmp_path)
    given = PeftModel.from_pretrained(base(), str(folder), config=config(positions="all"))
    assert given.peft_config["default"].to_dict()["positions"] == "all"
    assert not torch.equal(logits(given), logits(PeftModel.from_pretrained(base(), str(folder))))


def test_weights_with_edits_that_an_adapter_lacks_are_refused(tmp_path: Path):
    weights = load_peft_weights(str(saved(tmp_path, share_weights=False)), device="cpu")
    peft = get_peft_model(base(), config())
    before = as_it_was(peft)
    with pytest.raises(reftune.ReftuneError, match="reft_suffix_edits"):
        set_peft_model_state_dict(peft, weights)
    assert as_it_was(peft) == before


def test_the_name_of_another_methods_adapter_is_refused():
    lora = get_peft_model(base(), LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj"]))
    before = as_it_was(lora)
    for model in (lora, lora.get_base_model()):
        with pytest.raises(reftune.ReftuneError, match="LORA adapter: give this one a name"):
            get_peft_model(model, config())
    assert as_it_was(lora) == before


def test_two_ready_made_edits_in_one_block_are_refused_and_leave_nothing():
    model = base()
    sites = [reftune.engine.sites.find_sites(model, part, [1])[0] for part in ("block_output", "mlp_output")]
    edits = {site: reftune.edits.make_edit("loreft", site.width, 2) for site in sites}
    with pytest.raises(reftune.ReftuneError, match="one name, one edit"):
        reftune.attach(model, edits=edits)
    assert nothing_of_ours(model)


# What is left after the last adapter


def nothing_of_ours(model: Any) -> bool:
    plain = base()
    assert torch.equal(logits(model), logits(plain))
    assert [name for name, _ in model.named_modules()] == [name for name, _ in plain.named_modules()]
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
    own = {name for name in vars(model) if name not in vars(plain)}
    return Engine.of(model) is None and own <= {"_hf_peft_config_loaded", "name_or_path"}


def _by_transformers(model: Any, names: list[str]) -> Any:
    for number, name in enumerate(names):
        model.add_adapter(config(layers_to_transform=[number]), adapter_name=name)
    assert not torch.equal(logits(model), logits(base()))
    return model


@pytest.mark.parametrize("names", [["default"], ["a", "b"]])
def test_transformers_delete_adapter_leaves_nothing(names: list[str]):
    model = _by_transformers(base(), names)
    for name in names:
        model.delete_adapter(name)
    assert nothing_of_ours(model)
    model = _by_transformers(model, names)
    model.delete_adapter(names)
    assert nothing_of_ours(model)


@pytest.mark.parametrize("how", ["delete_adapter", "unload"])
def test_peft_leaves_nothing(how: str):
    peft = get_peft_model(base(), config())
    peft.add_adapter("other", config(layers_to_transform="all"))
    model = peft.get_base_model()
    if how == "unload":
        peft.unload()
    else:
        peft.delete_adapter("other")
        peft.delete_adapter("default")
        del model.peft_config
    assert nothing_of_ours(model)


def test_after_the_active_adapter_the_one_that_is_left_is_active_everywhere():
    peft = get_peft_model(base(), config(layers_to_transform=[0]), "a")
    peft.add_adapter("b", config(layers_to_transform=[1, 2]))
    peft.set_adapter("b")
    expected = logits(peft)
    peft.set_adapter("a")
    peft.delete_adapter("a")
    assert peft.active_adapters == ["b"] and torch.equal(logits(peft), expected)


def test_an_adapter_of_lora_beside_stays_when_the_edits_go():
    lora = get_peft_model(base(), LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj"]))
    alone = logits(lora)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        both = get_peft_model(lora.get_base_model(), config(), adapter_name="edit")
    assert not torch.equal(logits(both), alone)
    both.delete_adapter("edit")
    assert torch.equal(logits(lora), alone) and list(lora.peft_config) == ["default"]
