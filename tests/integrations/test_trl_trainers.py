"""ReFT under TRL's further trainers, and what TRL sets in a configuration by itself."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from datasets import Dataset
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from tests.integrations.test_trl import common, config
from tests.tiny_models import TINY


def test_a_chat_template_with_new_tokens_trains_them_beside_the_edits(tmp_path, tiny_tokenizer):
    other = copy.deepcopy(tiny_tokenizer)
    other.add_special_tokens({"additional_special_tokens": ["<new>"]})
    other.save_pretrained(tmp_path / "template")
    tiny_tokenizer.chat_template = None
    turns = {role: [{"role": who, "content": "one"}] for role, who in (("prompt", "user"), ("completion", "assistant"))}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer: Any = SFTTrainer(
            model=TINY["llama"](),
            args=SFTConfig(**common(tmp_path, max_steps=1, chat_template_path=str(tmp_path / "template"))),
            train_dataset=Dataset.from_list([turns] * 4),
            processing_class=tiny_tokenizer,
            peft_config=config(),
        )
        before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
        trainer.train()
    parameters = dict(trainer.model.named_parameters())
    moved = [name for name, value in before.items() if not torch.equal(value, parameters[name])]
    assert any("lm_head" in name for name in moved) and any("reft_edits" in name for name in moved)
    assert any("trainable_tokens_delta" in name for name in before)
