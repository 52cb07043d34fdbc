"""A tiny model with an edit that changes its answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model

import reftune
from reftune.data.tokenising import Encoding
from reftune.inference.loading import EditedModel, within_context
from reftune.models import load
from tests.cli.tiny_folder import save_tiny_model


def tiny_edited(folder: Path, **settings: Any) -> EditedModel:
    """An adapter at the last prompt token of layer 1, moved away from the identity."""
    base, tokenizer = load(str(save_tiny_model(folder)), device="cpu")
    settings = {"r": 2, "layers_to_transform": [1], "positions": "l1", "task_type": "CAUSAL_LM", **settings}
    model: Any = get_peft_model(base, reftune.ReftConfig(**settings))
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias") and "reft_edits" in name:
                parameter.copy_(torch.randn_like(parameter) * 5)
    return EditedModel(model.eval(), tokenizer, within_context(Encoding(tokenizer), base))
