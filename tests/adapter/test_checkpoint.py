"""Adapter folders that are damaged or belong elsewhere: each is refused with what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import reftune
from reftune.adapter.checkpoint import load_adapter
from tests.tiny_models import TINY, tiny_inputs

INPUTS = tiny_inputs("llama")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = get_peft_model(
        TINY["llama"](), reftune.ReftConfig(r=2, layers_to_transform=[1, 2], init="paper", task_type="CAUSAL_LM")
    )
    model.save_pretrained(tmp_path)
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
    refused(folder, "holds no tensor for", "another base model")


def test_an_adapter_of_a_wider_base_is_refused_with_both_shapes(tmp_path: Path):
    wide = TINY["llama"]()
    config = type(wide.config)(**{**wide.config.to_dict(), "hidden_size": 48, "head_dim": 12})
    model = get_peft_model(type(wide)(config), reftune.ReftConfig(r=2, layers_to_transform=[1], task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path)
    refused(tmp_path, "(2, 48)", "(2, 32)", "another base model")


def test_an_adapter_of_a_deeper_base_is_refused_with_the_layers_there_are(folder: Path):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "layers_to_transform": [25]}))
    refused(folder, "layers_to_transform=[25]", "0 to 2")
