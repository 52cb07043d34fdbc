"""A tiny RoBERTa without a head, with a byte-level tokenizer that writes <s> a </s></s> b </s>, and rows for each task."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaModel

from reftune.data.glue import GLUE

TOPICS = ("bread and salt", "rain and fog", "a long road", "two old ships", "the red door", "cold tea", "a loud bell")


def classifier_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte between RoBERTa's special tokens."""
    specials = ["<s>", "<pad>", "</s>", "<unk>"]
    vocabulary = {name: index for index, name in enumerate([*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.add_special_tokens(specials)
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    core.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    core.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, cls_token="<s>", sep_token="</s>", eos_token="</s>", bos_token="<s>", pad_token="<pad>",
        unk_token="<unk>", model_max_length=256,
    )  # fmt: skip


def save_tiny_encoder(folder: Path) -> Path:
    """Write encoder and tokenizer into `folder` and return it."""
    tokenizer = classifier_tokenizer()
    config = RobertaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=260, type_vocab_size=1, pad_token_id=1, bos_token_id=0, eos_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        RobertaModel(config, add_pooling_layer=False).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def glue_rows(task: str, count: int, *, named: bool = False) -> list[dict[str, Any]]:
    """Rows in a GLUE task's columns, classes in turn, as numbers or by name."""
    known = GLUE[task]
    rows = []
    for index in range(count):
        row: dict[str, Any] = {
            column: f"{TOPICS[(index + place) % len(TOPICS)]} {index}" for place, column in enumerate(known.columns)
        }
        if not known.labels:
            row["label"] = round(index % 6 * 0.8, 1)
        else:
            number = index % len(known.labels)
            row["label"] = known.labels[number] if named else number
        rows.append(row | {"idx": index})
    return rows


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
