"""Small rows, models and trainers for the training tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from reftune import ReftConfig
from reftune.data.collating import CompletionCollator
from reftune.training.arguments import ReftTrainingArguments
from reftune.training.trainer import ReftTrainer
from tests.tiny_models import TINY

VOLATILE = ("runtime", "per_second", "total_flos", "train_loss")
"""Parts of log entries that measure the machine, or one call of `train`, and so differ between equal runs."""


def rows(count: int, seed: int = 0) -> list[dict[str, list[int]]]:
    """Random prompts of 3 to 8 tokens with completions of 1 to 4."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, size: int = 1) -> list[int]:
        return torch.randint(low, high, (size,), generator=generator).tolist()

    made = []
    for _ in range(count):
        prompt, completion = draw(3, 90, draw(3, 9)[0]), draw(3, 90, draw(1, 5)[0])
        made.append({"input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion})
    return made


def batch(side: str = "right", count: int = 3, seed: int = 0) -> dict[str, Tensor]:
    """A padded batch of such rows, without prompt lengths: for models that carry no edit."""
    collated = CompletionCollator(0, side)(rows(count, seed))  # type: ignore[arg-type]
    del collated["prompt_lengths"]
    return collated


def lora_model(name: str = "llama", dropout: float = 0.0) -> Any:
    """A PEFT model that is trained like a ReFT one."""
    model = TINY[name]()
    torch.manual_seed(1)
    return get_peft_model(
        model, LoraConfig(r=2, lora_dropout=dropout, target_modules=["o_proj"], task_type="CAUSAL_LM")
    )


def reft_model(name: str = "llama", dropout: float = 0.0, **settings: Any) -> Any:
    """A tiny model with a ReFT adapter."""
    model = TINY[name]()
    torch.manual_seed(1)
    settings = {"r": 2, "layers_to_transform": [1], "positions": "f1+l2", "task_type": "CAUSAL_LM", **settings}
    return get_peft_model(model, ReftConfig(dropout=dropout, **settings))


def trainer(
    folder: Path | str, model: Any = None, callbacks: Any = None, train: Any = None, **settings: Any
) -> ReftTrainer:
    """A trainer of few steps on the CPU, without a progress bar or a log writer."""
    settings = {
        "per_device_train_batch_size": 2,
        "num_train_epochs": 2,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        **settings,
    }
    return ReftTrainer(
        model=reft_model() if model is None else model,
        args=ReftTrainingArguments(output_dir=str(folder), **settings),
        train_dataset=rows(10) if train is None else train,
        eval_dataset=rows(4, seed=9),
        data_collator=CompletionCollator(0),
        callbacks=callbacks,
    )


def history(run: ReftTrainer) -> list[dict[str, float]]:
    """The log without what the clock or one call's bounds put into it."""
    kept = [{k: v for k, v in entry.items() if not k.endswith(VOLATILE)} for entry in run.state.log_history]
    return [entry for entry in kept if set(entry) - {"epoch", "step"}]


def weights(model: Any) -> dict[str, Tensor]:
    """Copies of everything trainable."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
