"""Adapter folders that are damaged or belong elsewhere: each is refused with what is wrong."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

import reftune
from reftune.adapter.config import load_adapter
from reftune.adapter.info import read_adapter_info
from reftune.serving.folded import read_folded
from tests.tiny_models import TINY, tiny_inputs

INPUTS = tiny_inputs("llama")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = get_peft_model(
        TINY["llama"](), reftune.ReftConfig(r=2, layers_to_transform=[1, 2], init="paper", task_type="CAUSAL_LM")
    )
    model.save_pretrained(str(tmp_path))
    return tmp_path


def test_a_sound_folder_loads_bit_exactly(folder: Path):
    once, twice = load_adapter(TINY["llama"](), folder), PeftModel.from_pretrained(TINY["llama"](), str(folder))
    assert torch.equal(once(**INPUTS).logits, twice(**INPUTS).logits)


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(reftune.ReftuneError) as error:
        load_adapter(TINY["llama"](), folder)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_missing_folder_is_named(tmp_path: Path):
    refused(tmp_path / "nowhere", "nowhere", "is not a folder")


def test_a_folder_without_an_adapter_is_named(tmp_path: Path):
    refused(tmp_path, "adapter_config.json")


def test_a_config_that_is_no_json_is_named(folder: Path):
    (folder / "adapter_config.json").write_text("{")
    refused(folder, "adapter_config.json", "not valid JSON")


def test_an_adapter_of_another_method_is_named(folder: Path):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "peft_type": "LORA"}))
    refused(folder, "LORA")


@pytest.mark.parametrize("keep", [0, 4, 60, -10])
def test_a_weights_file_that_was_cut_off_is_named(folder: Path, keep: int):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(folder, "adapter_model.safetensors", "not an intact safetensors file")


def test_missing_weights_are_named(folder: Path):
    (folder / "adapter_model.safetensors").unlink()
    refused(folder, "adapter_model.safetensors", "does not exist")


def test_a_missing_tensor_is_refused_rather_than_left_random(folder: Path):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors.pop(next(iter(tensors)))
    save_file(tensors, path)
    refused(folder, "adapter_model.safetensors", "holds nothing for bias")


def test_an_adapter_of_a_wider_base_is_refused_with_both_shapes(tmp_path: Path):
    wide = TINY["llama"]()
    config = type(wide.config)(**{**wide.config.to_dict(), "hidden_size": 48, "head_dim": 12})
    model = get_peft_model(type(wide)(config), reftune.ReftConfig(r=2, layers_to_transform=[1], task_type="CAUSAL_LM"))
    model.save_pretrained(str(tmp_path))
    refused(tmp_path, "(2, 48)", "(2, 32)", "another base model")


def test_an_adapter_of_a_deeper_base_is_refused_with_the_layers_there_are(tmp_path: Path):
    deep = TINY["llama"]()
    config = type(deep.config)(**{**deep.config.to_dict(), "num_hidden_layers": 6, "layer_types": None})
    model = get_peft_model(type(deep)(config), reftune.ReftConfig(r=2, layers_to_transform=[5], task_type="CAUSAL_LM"))
    model.save_pretrained(str(tmp_path))
    refused(tmp_path, "layers_to_transform=[5]", "0 to 2")


def change_config(folder: Path, **values: object) -> None:
    path = folder / "adapter_config.json"
    kept = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({name: value for name, value in kept.items() if value is not ...}))


FIELDS = [
    *({name: ...} for name in ("method", "r", "layers_to_transform", "component", "positions", "share_weights", "act_fn")),
    {"share_weights": "no"}, {"share_weights": 1}, {"r": "2"}, {"r": 2.0}, {"r": True}, {"r": 0}, {"r": 3},
    {"layers_to_transform": "1"}, {"layers_to_transform": [True, 2]}, {"layers_to_transform": [1, 5]},
    {"layers_to_transform": [1, 1]}, {"layers_to_transform": [1]}, {"positions": ["l1"]}, {"positions": "q1"},
    {"position": "l1"}, {"share_weight": False}, {"scale": 2.0}, {"method": ["loreft"]}, {"method": "direft"},
    {"component": 3}, {"component": ""}, {"act_fn": "rlu"}, {"act_fn": False}, {"init": "zero"}, {"dropout": "0"},
    {"parametrization": "house"}, {"add_bias": "false"}, {"add_bias": True}, {"inference_mode": "yes"},
    {"modules_to_save": "lm_head"}, {"modules_to_save": ["lm_head"]}, {"trainable_token_indices": "3"},
]  # fmt: skip


@pytest.mark.parametrize("change", FIELDS, ids=str)
def test_a_field_that_does_not_say_the_function_is_refused_by_all_that_read_a_folder(folder: Path, change: dict):
    change_config(folder, **change)
    (field,) = change
    for read in (read_adapter_info, read_folded, lambda place: load_adapter(TINY["llama"](), place)):
        with pytest.raises(reftune.ReftuneError, match=f"{folder}/adapter_") as error:
            read(folder)
        assert field in str(error.value) or change in ({"r": 3}, {"method": "direft"})


@pytest.mark.parametrize("change", FIELDS[:26], ids=str)
def test_peft_loads_no_such_field_either(folder: Path, change: dict):
    change_config(folder, **change)
    with pytest.raises(reftune.ReftuneError, match=f"{folder}/adapter_"):
        PeftModel.from_pretrained(TINY["llama"](), str(folder))


def test_the_auto_classes_of_peft_refuse_unknown_and_missing_fields(folder: Path):
    for change in ({"position": "l1"}, {"positions": ...}):
        change_config(folder, **change)
        with pytest.raises(reftune.ReftuneError, match="position"):
            PeftConfig.from_pretrained(str(folder))


def test_fields_that_ask_for_nothing_and_older_folders_load(folder: Path):
    expected = load_adapter(TINY["llama"](), folder)(**INPUTS).logits
    change_config(folder, trainable_token_indices=..., ensure_weight_tying=..., peft_version=..., auto_mapping=...)
    assert torch.equal(load_adapter(TINY["llama"](), folder)(**INPUTS).logits, expected)
    assert len(read_adapter_info(folder).edits) == len(read_folded(folder).edits) == 2
    change_config(folder, new_field_of_peft=None, other=[])
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert torch.equal(load_adapter(TINY["llama"](), folder)(**INPUTS).logits, expected)
    assert any("Unexpected keyword arguments" in str(one.message) for one in told)


PREFIX = "base_model.model.model."
TENSORS = {
    "NaN": (lambda t: {name: value * torch.nan if name.endswith("bias") else value for name, value in t.items()}, "bias.*not finite"),
    "infinite": (lambda t: {name: value + torch.inf for name, value in t.items()}, "not finite"),
    "half NaN": (lambda t: {name: (value * torch.nan).half() for name, value in t.items()}, "not finite"),
    "bfloat16 infinite": (lambda t: {name: (value + torch.inf).bfloat16() for name, value in t.items()}, "not finite"),
    "integers": (lambda t: {name: value.int() for name, value in t.items()}, "I32|int32"),
    "booleans": (lambda t: {name: value.bool() for name, value in t.items()}, "BOOL|bool"),
    "float8": (lambda t: {name: value.to(torch.float8_e4m3fn) for name, value in t.items()}, "F8|float8"),
    "missing": (lambda t: dict(list(t.items())[1:]), "holds n.*bias"),
    "foreign": (lambda t: t | {"x": torch.ones(1)}, "x is no tensor of this adapter"),
    "a weight of the base": (lambda t: t | {f"{PREFIX}layers.0.mlp.down_proj.weight": torch.zeros(32, 64)}, "down_proj.weight is no tensor"),
    "one too many": (lambda t: t | {f"{PREFIX}layers.1.intervention.reft_edits.gate": torch.ones(1)}, "gate"),
    "a suffix": (lambda t: t | {name.replace("reft_edits", "reft_suffix_edits"): value.clone() for name, value in t.items()}, "reft_suffix_edits.* is no tensor"),
    "transposed": (lambda t: {name: value.mT.contiguous() if value.ndim > 1 else value for name, value in t.items()}, r"shape \("),
}  # fmt: skip


@pytest.mark.parametrize("damage", TENSORS)
def test_tensors_that_are_not_the_adapters_are_refused_by_all_that_read_them(folder: Path, damage: str):
    change, words = TENSORS[damage]
    path = folder / "adapter_model.safetensors"
    tensors = change(load_file(path))
    model = PeftModel.from_pretrained(TINY["llama"](), str(folder))
    save_file(tensors, path)
    before = model(**INPUTS).logits
    for read in (
        read_adapter_info,
        read_folded,
        lambda place: load_adapter(TINY["llama"](), place),
        lambda place: PeftModel.from_pretrained(TINY["llama"](), str(place)),
        lambda place: model.load_adapter(str(place), "second"),
    ):
        with pytest.raises(reftune.ReftuneError, match=f"{path}.*({words})"):
            read(folder)
    with pytest.raises(reftune.ReftuneError, match=words):
        set_peft_model_state_dict(model, tensors)
    assert torch.equal(model(**INPUTS).logits, before)
