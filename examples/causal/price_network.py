"""A small transformer that learns price tagging, with its tokenizer: the network of tutorials 3 and 5."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from reftune.causal.counterfactuals import factual
from reftune.causal.model import CausalModel, Setting
from reftune.causal.models import price_tagging

HIGHEST = 99
WORDS = [*(str(n) for n in range(HIGHEST + 1)), "<pad>", "?", "below", "inside", "above"]
TOKENS = ["low", "high", "amount", "?"]
VERDICTS = ["below", "inside", "above"]
ANSWERS = tuple(WORDS.index(word) for word in VERDICTS)


def price_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<pad>")


def prompt(setting: Setting) -> str:
    return f"{setting['low']} {setting['high']} {setting['amount']} ?"


def encode(settings: Sequence[Setting]) -> dict[str, Any]:
    words = [[WORDS.index(word) for word in prompt(setting).split()] for setting in settings]
    return {"input_ids": torch.tensor(words), "logits_to_keep": 1}


def label(setting: Setting) -> int:
    return VERDICTS.index(setting["verdict"])


def price_model() -> CausalModel:
    return price_tagging(HIGHEST, least_gap=20, greatest_gap=60, verdict=True)


def trained_network(causal: CausalModel, steps: int = 1500, batch: int = 256) -> LlamaForCausalLM:
    """Train on random brackets; half a minute on one core."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=64, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=16, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=None, pad_token_id=WORDS.index("<pad>"),
    )  # fmt: skip
    network = LlamaForCausalLM(config)
    settings = factual(causal, 100_000, seed=1)
    inputs, labels = encode(settings), torch.tensor([label(setting) for setting in settings])
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(steps):
        index = torch.randint(len(labels), (batch,))
        logits = network(input_ids=inputs["input_ids"][index], logits_to_keep=1).logits[:, -1]
        loss = F.cross_entropy(logits[:, ANSWERS], labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval()


@torch.no_grad()
def answers(network: Any, settings: Sequence[Setting]) -> torch.Tensor:
    """Indices of the verdicts."""
    return network(**encode(settings)).logits[:, -1][:, ANSWERS].argmax(-1)
