"""Fields that PEFT shares between methods: tokens trained beside the edits, and modules tied to the embedding."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import reftune
from reftune.adapter.config import load_adapter
from reftune.adapter.info import read_adapter_info
from reftune.serving.folded import read_folded
from tests.adapter.test_tuner import logits, shake
from tests.tiny_models import TINY

TIED = [False, True]


def base(tied: bool) -> Any:
    model: Any = TINY["llama"]()
    model.config.tie_word_embeddings = tied
    model.tie_weights()
    return model


def config(**fields: Any) -> reftune.ReftConfig:
    return reftune.ReftConfig(r=2, task_type="CAUSAL_LM", **fields)


@pytest.mark.parametrize("tied", TIED, ids=["untied", "tied"])
@pytest.mark.parametrize(
    "fields", [{"trainable_token_indices": [3, 5]}, {"trainable_token_indices": {"embed_tokens": [3, 5]}}]
)
def test_chosen_tokens_train_with_the_edits_and_reload_bit_exactly(tied: bool, fields: dict, tmp_path: Path):
    base(tied).save_pretrained(tmp_path / "base")
    plain = logits(base(tied))
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config(**fields))
    trained = [p for n, p in model.named_parameters() if p.requires_grad and "reft_edits" not in n]
    assert [tuple(p.shape) for p in trained] == [(2, 32)]
    assert torch.equal(logits(model), plain)
    shake(model)
    expected = logits(model.eval())
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    changed = (embedding != base(tied).get_input_embeddings().weight).any(-1).nonzero().flatten()
    assert changed.tolist() == [3, 5] and torch.equal(head, embedding) == tied
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    model.save_pretrained(str(tmp_path / "adapter"))
    for low_memory in (False, True):
        again = PeftModel.from_pretrained(base(tied), str(tmp_path / "adapter"), low_cpu_mem_usage=low_memory)
        assert torch.equal(logits(again), expected)
    assert torch.equal(logits(again.unload()), plain)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")), expected)


def test_a_module_tied_to_the_embedding_trains_as_one_where_that_is_asked_for(tmp_path: Path):
    model = get_peft_model(base(tied=True), config(modules_to_save=["lm_head"], ensure_weight_tying=True))
    shake(model)
    assert torch.equal(model.get_input_embeddings().weight, model.get_output_embeddings().weight)
    expected = logits(model.eval())
    model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(base(tied=True), str(tmp_path))
    assert torch.equal(logits(again), expected)
    plain: nn.Module = again.unload()
    assert torch.equal(logits(plain), logits(base(tied=True)))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        get_peft_model(base(tied=True), config(modules_to_save=["lm_head"]))
    assert any("ensure_weight_tying" in str(warning.message) for warning in told)


def test_tokens_and_a_whole_head_of_the_same_weights_are_refused_before_anything_changes():
    model = base(tied=True)
    fields = {"trainable_token_indices": {"embed_tokens": [3]}, "modules_to_save": ["lm_head"]}
    with warnings.catch_warnings(), pytest.raises(reftune.ReftuneError, match="lm_head shares the embedding's weights"):
        warnings.simplefilter("ignore")
        get_peft_model(model, config(**fields))
    assert not any("intervention" in name or "modules_to_save" in name for name, _ in model.named_modules())
    assert get_peft_model(base(tied=False), config(**fields)) is not None


@pytest.mark.parametrize("tied", TIED, ids=["untied", "tied"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [3, 5]},
    ],
    ids=str,
)
def test_an_adapter_that_was_saved_with_the_embeddings_loads(tied: bool, fields: dict, tmp_path: Path):
    model = get_peft_model(
        base(tied), config(**fields, ensure_weight_tying=tied and "modules_to_save" in fields)
    ).eval()
    shake(model)
    model.save_pretrained(str(tmp_path), save_embedding_layers=True)
    for load in (
        lambda: PeftModel.from_pretrained(base(tied), str(tmp_path)),
        lambda: load_adapter(base(tied), tmp_path),
    ):
        assert torch.equal(logits(load()), logits(model))
    assert read_adapter_info(tmp_path).edits
    with pytest.raises(reftune.ReftuneError, match="Serve it by itself, with PeftModel"):
        read_folded(tmp_path)


def test_embeddings_fit_whichever_adapters_wrap_them(tmp_path: Path):
    model = get_peft_model(base(tied=False), config(modules_to_save=["lm_head"])).eval()
    model.add_adapter("plain", config())
    model.set_adapter("plain")
    shake(model)
    model.save_pretrained(str(tmp_path), save_embedding_layers=True, selected_adapters=["plain"])
    again = PeftModel.from_pretrained(base(tied=False), str(tmp_path / "plain"))
    assert torch.equal(logits(again), logits(model))
    again = get_peft_model(base(tied=False), config(modules_to_save=["lm_head"]))
    again.load_adapter(str(tmp_path / "plain"), "plain")
    again.set_adapter("plain")
    assert torch.equal(logits(again.eval()), logits(model))


def resized(dtype: torch.dtype = torch.float32) -> Any:
    model = base(tied=False).to(dtype)
    model.resize_token_embeddings(model.config.vocab_size + 5)
    return model


@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("here", [torch.float32, torch.float16], ids=str)
def test_rows_of_new_tokens_come_with_the_adapter(saved: torch.dtype, here: torch.dtype, tmp_path: Path):
    model = get_peft_model(resized(saved), config())
    model.save_pretrained(str(tmp_path), save_embedding_layers=True)
    again = PeftModel.from_pretrained(resized(here), str(tmp_path))
    for name in ("get_input_embeddings", "get_output_embeddings"):
        found, expected = (getattr(one, name)().weight[-5:] for one in (again, model))
        assert torch.equal(found, expected.to(here))


@pytest.mark.parametrize("rows", [slice(None), slice(0, 1), slice(7, 8)], ids=str)
@pytest.mark.parametrize("embedding", ["lm_head", "model.embed_tokens"])
def test_embeddings_of_another_base_are_refused_where_nothing_says_that_they_were_trained(
    rows: slice, embedding: str, tmp_path: Path
):
    get_peft_model(base(tied=False), config()).save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_model.safetensors"
    weight = base(tied=False).get_submodule(embedding).weight.detach().clone()
    save_file(load_file(path) | {f"base_model.model.{embedding}.weight": weight}, path)
    PeftModel.from_pretrained(base(tied=False), str(tmp_path))
    weight[rows] *= 1.01
    save_file(load_file(path) | {f"base_model.model.{embedding}.weight": weight}, path)
    model = base(tied=False)
    with pytest.raises(reftune.ReftuneError, match=f"{path}: {embedding}.weight is not this base model's"):
        PeftModel.from_pretrained(model, str(tmp_path))
    assert torch.equal(logits(model), logits(base(tied=False)))
