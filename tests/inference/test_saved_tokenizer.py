"""The tokenizer beside an adapter is the one that every command speaks with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model

import reftune
from reftune.errors import ReftuneError
from reftune.inference.classifying import load_classifier
from reftune.inference.generation import stop_tokens
from reftune.inference.loading import load_edited
from reftune.models import load
from tests.inference.edited import tiny_edited
from tests.tiny_classifier import classifier_tokenizer, save_tiny_encoder

SHORT = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def test_a_tokenizer_beside_the_adapter_is_the_one_it_was_trained_with(tmp_path: Path) -> None:
    edited, out = tiny_edited(tmp_path / "base"), str(tmp_path / "out")
    edited.tokenizer.chat_template = SHORT
    edited.tokenizer.add_special_tokens({"eos_token": "<|over|>"})
    base: Any = edited.model.get_base_model()
    base.resize_token_embeddings(len(edited.tokenizer))
    with pytest.warns(UserWarning, match="embedding layer has been resized"):
        edited.model.save_pretrained(out)
    edited.tokenizer.save_pretrained(out)
    loaded = load_edited(out, device="cpu")
    ids = loaded.encoding.prompt_ids(["hi"])
    assert loaded.tokenizer.decode(ids[0]) == "[user] hi<|im_end|>[assistant] "
    over = edited.tokenizer.eos_token_id
    assert over in stop_tokens(loaded) and loaded.model.get_input_embeddings().weight.shape[0] == over + 1
    with torch.no_grad():
        inputs = torch.tensor([[*ids[0], over]])
        assert torch.equal(loaded.model(inputs).logits, edited.model(inputs).logits)


def test_rows_for_tokens_that_the_adapter_does_not_bring_are_the_same_each_time(tmp_path: Path) -> None:
    edited, out = tiny_edited(tmp_path / "base"), str(tmp_path / "out")
    edited.model.save_pretrained(out)
    edited.tokenizer.add_tokens(["<|new|>"])
    edited.tokenizer.save_pretrained(out)
    once, twice = (load_edited(out, device="cpu").model.get_input_embeddings().weight for _ in range(2))
    assert torch.equal(once, twice) and len(once) == len(edited.tokenizer)


def test_a_chat_template_alone_is_read_too(tmp_path: Path) -> None:
    edited = tiny_edited(tmp_path / "base")
    edited.model.save_pretrained(str(tmp_path / "out"))
    (tmp_path / "out" / "chat_template.jinja").write_text(SHORT)
    loaded = load_edited(tmp_path / "out", device="cpu")
    assert loaded.tokenizer.decode(loaded.encoding.prompt_ids(["hi"])[0]) == "[user] hi<|im_end|>[assistant] "


@pytest.mark.parametrize("name", ["tokenizer_config.json", "tokenizer.json"])
def test_a_damaged_tokenizer_is_named(tmp_path: Path, name: str) -> None:
    edited, out = tiny_edited(tmp_path / "base"), tmp_path / "out"
    edited.model.save_pretrained(str(out))
    edited.tokenizer.save_pretrained(str(out))
    (out / name).write_text("{")
    with pytest.raises(ReftuneError, match=f"tokenizer saved in {out} cannot be read"):
        load_edited(out, device="cpu")


def test_a_classifier_reads_with_it_too(tmp_path: Path) -> None:
    base, _ = load(str(save_tiny_encoder(tmp_path / "base")), device="cpu", task="seq_cls", num_labels=2)
    config = reftune.ReftConfig(r=1, positions="f1", task_type="SEQ_CLS", modules_to_save=["classifier"])
    get_peft_model(base, config).save_pretrained(str(tmp_path / "out"))
    tokenizer = classifier_tokenizer()
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(tmp_path / "out")
    classifier = load_classifier(tmp_path / "out", device="cpu")
    assert classifier.tokenizer("<new>").input_ids[1] == len(tokenizer) - 1
    assert classifier.model.get_input_embeddings().num_embeddings == len(tokenizer)


def test_the_harness_writes_prompts_with_it_unless_told_otherwise(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    from reftune.evaluation.lm_eval import ReftuneLM

    harness: Any = ReftuneLM
    edited, out = tiny_edited(tmp_path / "base"), str(tmp_path / "out")
    edited.model.save_pretrained(out)
    base, plain = load(str(tmp_path / "base"), device="cpu")
    edited.tokenizer.chat_template = SHORT
    edited.tokenizer.add_tokens(["<|new|>"])
    edited.tokenizer.save_pretrained(out)
    turns, rows = [{"role": "user", "content": "Hi"}], len(edited.tokenizer)
    for settings in ({}, {"pretrained": base}):
        found = harness(peft=out, device="cpu", batch_size=1, **settings)
        assert found.apply_chat_template(turns) == "[user] Hi<|im_end|>[assistant] "
        assert found.model.get_input_embeddings().num_embeddings == rows == len(found.tokenizer)
    told = harness(peft=out, device="cpu", batch_size=1, tokenizer=plain)
    assert told.apply_chat_template(turns).startswith("<|im_start|>system")
