"""One experiment of PEFT's MetaMathQA comparison: its loop, its measurements, and its record, written anew.

As there: the loss is over the whole text, question and answer; every row is met once at most; AdamW with a clipped
gradient and a cosine after a tenth of warm-up; greedy answers; forgetting is the rise of the loss of plain text. Two
things differ: every row ends with EOS (there the longest of a batch does not), and `train_time` is that of the steps
alone. Source: github.com/huggingface/peft, method_comparison/MetaMathQA (run.py, utils.py, data.py).
"""

from __future__ import annotations

import datetime
import math
import platform
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import peft
import psutil
import torch
import transformers
from peft import PeftModel, get_peft_model
from transformers import get_cosine_schedule_with_warmup, set_seed

from benchmarks.peft_comparison.methods import Experiment
from benchmarks.peft_comparison.rows import Row, number
from reftune import models
from reftune.comparison.peak_memory import PeakMemory

BUCKET, WARMUP = 20, 0.1
IGNORED = -100


@dataclass
class TrainConfig:
    """PEFT's `train_config`; the defaults are those of its `default_training_params.json`."""

    model_id: str = "meta-llama/Llama-3.2-3B"
    dtype: str = "bfloat16"
    max_seq_length: int = 768
    batch_size: int = 4
    batch_size_eval: int = 50
    max_steps: int = 5000
    eval_steps: int = 250
    query_template: str = "Question: {query} Think step by step.\nAnswer:"
    seed: int = 0
    grad_norm_clip: float = 1.0
    optimizer_type: str = "AdamW"
    optimizer_kwargs: dict[str, float] = field(default_factory=dict)
    lr_scheduler: str = "cosine"
    use_amp: bool = False
    autocast_adapter_dtype: bool = True
    generation_kwargs: dict[str, int] = field(default_factory=lambda: {"max_length": 800, "max_new_tokens": 300})


@dataclass(frozen=True)
class Data:
    """Rows to train on, to watch, to test with, and plain texts to measure forgetting."""

    train: list[Row]
    valid: list[Row]
    test: list[Row]
    plain: list[str]


def run_experiment(experiment: Experiment, settings: TrainConfig, data: Data, short: bool) -> dict[str, Any]:
    """Train, measure, and return the record in PEFT's layout."""
    started, memory = time.perf_counter(), PeakMemory(own_process=True)
    created = datetime.datetime.now(tz=datetime.timezone.utc).replace(microsecond=0).isoformat()
    set_seed(settings.seed)
    base, tokenizer = models.load(settings.model_id, settings.dtype)
    batches = list(_batches(data.train, tokenizer, settings))[: settings.max_steps]
    tokens = [int(batch["attention_mask"].sum()) for batch in batches]
    settings.optimizer_kwargs = experiment.optimiser(base, float(np.mean(tokens)), short)
    before = plain_loss(base, tokenizer, data.plain, settings)
    model = get_peft_model(base, experiment.config(), autocast_adapter_dtype=settings.autocast_adapter_dtype)
    trained, total = model.get_nb_trainable_parameters()

    kwargs: dict[str, Any] = {**settings.optimizer_kwargs}
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), **kwargs)
    schedule = get_cosine_schedule_with_warmup(optimizer, int(WARMUP * len(batches)), len(batches))
    losses: list[float] = []
    seconds: list[float] = []
    held: list[int] = []
    metrics: list[dict[str, Any]] = []
    for step, batch in enumerate(batches, start=1):
        model.train()
        begun = time.perf_counter()
        loss = model(**{name: tensor.to(model.device) for name, tensor in batch.items()}).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.grad_norm_clip)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - begun)
        held.append(_held())
        if step % settings.eval_steps == 0:
            begun, window = time.perf_counter(), slice(step - settings.eval_steps, step)
            metrics.append({
                "step": step,
                "valid accuracy": accuracy(model, tokenizer, data.valid, settings),
                "train loss": float(np.mean(losses[window])),
                "train samples": step * settings.batch_size,
                "train time": sum(seconds[window]),
                "eval time": time.perf_counter() - begun,
                "tokens / sec": sum(tokens[window]) / sum(seconds[window]),
                "mem allocated avg": float(np.mean(held[window])),
                "elapsed time": time.perf_counter() - started,
            })  # fmt: skip
    peak = memory.bytes()
    last = losses[-settings.eval_steps :]
    metrics.append({
        "step": len(batches),
        "test accuracy": accuracy(model, tokenizer, data.test, settings),
        "train loss": float(np.mean(last)),
        "train samples": len(batches) * settings.batch_size,
        "train total tokens": sum(tokens),
        "forgetting": plain_loss(model, tokenizer, data.plain, settings) - before,
    })  # fmt: skip
    return {
        "run_info": {
            "created_at": created,
            "total_time": time.perf_counter() - started,
            "experiment_name": experiment.name,
            "peft_branch": "main",
            "train_config": asdict(settings),
            "peft_config": _listed(model.peft_config["default"].to_dict()),
            "error_msg": "",
        },
        "train_info": {
            "accelerator_memory_reserved_avg": int(np.mean(held)),
            "accelerator_memory_max": peak,
            "accelerator_memory_reserved_99th": int(np.percentile(held, 99)),
            "train_time": sum(seconds),
            "file_size": file_size(model),
            "num_trainable_params": trained,
            "num_total_params": total,
            "status": "success",
            "metrics": metrics,
        },
        "meta_info": {
            "model_info": {"sha": None, "created_at": None},
            "dataset_info": {},
            "package_info": {
                "transformers-version": transformers.__version__,
                "peft-version": peft.__version__,
                "torch-version": torch.__version__,
            },
            "system_info": {
                "system": platform.system(),
                "machine": platform.machine(),
                "accelerator": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU",
            },
        },
    }


def _batches(rows: Sequence[Row], tokenizer: Any, settings: TrainConfig) -> Iterator[dict[str, torch.Tensor]]:
    """Batches within buckets of twenty, the longest rows first, each row once; padding is not learnt."""
    for start in range(0, len(rows), settings.batch_size * BUCKET):
        bucket = rows[start : start + settings.batch_size * BUCKET]
        texts = [settings.query_template.format(query=row.query) + row.response for row in bucket]
        ids = [row[: settings.max_seq_length - 1] + [tokenizer.eos_token_id] for row in tokenizer(texts).input_ids]
        ids.sort(key=len, reverse=True)
        for first in range(0, len(ids) - settings.batch_size + 1, settings.batch_size):
            padded = tokenizer.pad(
                {"input_ids": ids[first : first + settings.batch_size]}, return_tensors="pt", padding_side="right"
            )
            labels = padded["input_ids"].masked_fill(padded["attention_mask"] == 0, IGNORED)
            yield {**padded, "labels": labels}


@torch.inference_mode()
def accuracy(model: Any, tokenizer: Any, rows: Sequence[Row], settings: TrainConfig) -> float:
    """The share of greedy answers that end with the right number."""
    model.eval()
    right = 0
    limits = dict(settings.generation_kwargs)
    for start in range(0, len(rows), settings.batch_size_eval):
        some = rows[start : start + settings.batch_size_eval]
        texts = [settings.query_template.format(query=row.query) for row in some]
        batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left").to(model.device)
        length = batch["input_ids"].shape[1]
        room = min(limits["max_new_tokens"], limits["max_length"] - length)
        written = model.generate(**batch, max_new_tokens=room, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        answers = tokenizer.batch_decode(written[:, length:], skip_special_tokens=True)
        right += sum(number(answer) == number(row.response) for answer, row in zip(answers, some, strict=True))
    return right / len(rows)


@torch.inference_mode()
def plain_loss(model: Any, tokenizer: Any, texts: Sequence[str], settings: TrainConfig) -> float:
    """Mean loss a token of plain texts, in nats, each token by what stands before it."""
    model.eval()
    sums, count = 0.0, 0
    for text in texts:
        ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=settings.max_seq_length).input_ids
        loss = float(model(input_ids=ids.to(model.device), labels=ids.to(model.device)).loss)
        sums, count = sums + loss * (ids.shape[1] - 1), count + ids.shape[1] - 1
    return sums / count if count else math.nan


def file_size(model: PeftModel) -> int:
    """Bytes of the saved adapter's weights."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return (Path(folder) / "adapter_model.safetensors").stat().st_size


def _held() -> int:
    """Bytes held now: of the GPU's reserve, or of this process."""
    return torch.cuda.memory_reserved() if torch.cuda.is_available() else int(psutil.Process().memory_info().rss)


def _listed(values: dict[str, Any]) -> dict[str, Any]:
    return {name: sorted(value) if isinstance(value, set) else value for name, value in values.items()}
