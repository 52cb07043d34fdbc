"""Adapter folders on the tiny model, each with answers of its own."""

from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model

import reftune
from reftune.models import load


def save_adapter(model_folder: Path, folder: Path, seed: int, **settings: Any) -> Path:
    """An adapter with strong random edits."""
    base, _ = load(str(model_folder), device="cpu")
    settings = {"r": 2, "layers_to_transform": [0, 1], "positions": "l1", "task_type": "CAUSAL_LM", **settings}
    model: Any = get_peft_model(base, reftune.ReftConfig(**settings))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "reft_edits" in name and "rotation" not in name:
                parameter.copy_(torch.randn_like(parameter) * 3)
    model.save_pretrained(str(folder))
    return folder


def answers(model_folder: Path, folder: Path | None, rows: list[list[int]], tokens: int) -> list[list[int]]:
    """Greedy answers, one by one, by `generate` with PEFT."""
    from peft import PeftModel

    base, tokenizer = load(str(model_folder), device="cpu")
    model: Any = base if folder is None else PeftModel.from_pretrained(base, str(folder))
    ends = int(tokenizer.eos_token_id)  # type: ignore[arg-type]
    found = []
    for row in rows:
        with torch.no_grad():
            written = model.eval().generate(
                input_ids=torch.tensor([row]), attention_mask=torch.ones(1, len(row), dtype=torch.long),
                max_new_tokens=tokens, do_sample=False, eos_token_id=ends, pad_token_id=0,
            )  # fmt: skip
        found.append(written[0, len(row) :].tolist())
    return found
