"""Adapter folders with random, strong edits, saved by PEFT from a tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn

import reftune


def save_adapter(model: nn.Module, folder: Path, seed: int = 0, strength: float = 1.0, **config: Any) -> Path:
    """Save an adapter of ``ReftConfig(**config)`` whose edits are random; the model is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft = get_peft_model(model, reftune.ReftConfig(init="paper", **config))  # type: ignore[arg-type]
        for name, parameter in peft.named_parameters():
            if "intervention." in name and not name.endswith(("rotation", "reflectors", "basis")):
                parameter.data.normal_(0.0, strength)
        for name, buffer in peft.named_buffers():
            if name.endswith((".probe", ".threshold")):  # a gate that shuts on half of the states
                buffer.normal_(0.0, strength)
    peft.save_pretrained(str(folder))
    peft.unload()
    return folder


def edits_of(model: nn.Module, folder: Path) -> dict[str, nn.Module]:
    """The edits that PEFT loads from a folder, by block path (``<path>:suffix``), detached from the model again."""
    peft = PeftModel.from_pretrained(model, str(folder)).eval()
    edits = dict(peft.base_model.engine.edits("default"))
    peft.unload()
    return edits
