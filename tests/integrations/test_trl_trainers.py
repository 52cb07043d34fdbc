"""ReFT under TRL's further trainers, and what TRL sets in a configuration by itself."""

from __future__ import annotations

import copy
import importlib
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

import reftune
from tests.docs_blocks import PAGES, blocks
from tests.integrations.test_trl import ROWS, common, config, edited_rows, prompt_states
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


PAIRS = [{"prompt": row["prompt"], "chosen": " w1 w2", "rejected": " w3 w4 w5", "reference": " w7"} for row in ROWS]
CHATS = [
    {"messages": [{"role": who, "content": row[part].strip()} for who, part in (("user", "prompt"), ("assistant", "completion"))]}
    for row in ROWS
]  # fmt: skip
UNSAID = {  # trainers whose forwards say nothing of prompts: module, settings, rows, further arguments
    "ORPO": ("orpo", {"max_length": 24}, PAIRS, {}),
    "CPO": ("cpo", {"max_length": 24}, PAIRS, {}),
    "GKD": ("gkd", {"max_length": 24, "max_new_tokens": 3, "lmbda": 0.5}, CHATS, {"teacher_model": TINY["llama"]}),
    "OnlineDPO": (
        "online_dpo", {"max_length": 24, "max_new_tokens": 4}, [{"prompt": row["prompt"]} for row in ROWS],
        {"reward_funcs": lambda: lambda completions, **_: [float(len(text)) for text in completions]},
    ),
    "TPO": ("tpo", {"max_length": 24}, PAIRS, {}),
}  # fmt: skip


def unsaid(name: str, positions: str, tokenizer: Any, folder: Path, trainer_class: Any = None) -> Any:
    module, settings, rows, more = UNSAID[name]
    trl: Any = importlib.import_module(f"trl.experimental.{module}")
    return (trainer_class or getattr(trl, f"{name}Trainer"))(
        model=TINY["llama"](),
        args=getattr(trl, f"{name}Config")(**common(folder, max_steps=2, save_strategy="no", **settings)),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[:4]),
        processing_class=tokenizer,
        peft_config=config(positions=positions),
        **{key: make() for key, make in more.items()},
    )


@pytest.fixture(scope="module")
def documented() -> dict[str, Any]:
    """The classes of the page on trainers."""
    page = next(page for page in PAGES if page.name == "trainers.md")
    code = next(block.code for block in blocks(page, "python") if "class ReftORPOTrainer" in block.code)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(code, found := {})
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", UNSAID)
def test_a_trainer_that_does_not_say_where_prompts_end_is_stopped_and_trains_every_token(
    name, tmp_path, tiny_tokenizer
):
    with pytest.raises(reftune.ReftuneError, match="positions='all'.*docs/how-to/trainers.md"):
        unsaid(name, "l1", tiny_tokenizer, tmp_path).train()
    trainer = unsaid(name, "all", tiny_tokenizer, tmp_path)
    trainer.train()
    assert all(entry["loss"] == entry["loss"] for entry in trainer.state.log_history if "loss" in entry)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", UNSAID)
def test_the_documented_class_edits_the_last_prompt_token_of_every_row(name, tmp_path, tiny_tokenizer, documented):
    trainer = unsaid(name, "l1", tiny_tokenizer, tmp_path, documented[f"Reft{name}Trainer"])
    seen = edited_rows(trainer.model)
    trainer.train()
    if name in ("ORPO", "CPO", "GKD"):
        trainer.evaluate()
    texts = ROWS
    if name == "GKD":
        texts = [
            {
                "prompt": tiny_tokenizer.apply_chat_template(
                    row["messages"][:1], tokenize=False, add_generation_prompt=True
                )
            }
            for row in CHATS
        ]
    expected = prompt_states(tiny_tokenizer, texts)
    states = [one for one in seen if len(one)]
    assert {len(one) for one in states} <= {4, 8, 12} and len(states) >= 2
    nearest = (torch.cat(states)[:, None] - expected).abs().amax(-1).min(-1).values
    assert nearest.max() < 1e-4
