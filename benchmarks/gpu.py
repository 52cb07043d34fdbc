"""Training steps at real size with random weights: no download, one GPU.

Usage: python -m benchmarks.gpu [--shape llama3-8b|tiny] [--device cuda] [--prompt 512] [--batch 8]

Prints seconds a step (medians) for PEFT LoRA, for the edit without and with prefix reuse (first pass and cached), and
peak memory, on one machine in one run. ``--shape tiny --device cpu`` only shows that it runs.
"""

from __future__ import annotations

import argparse
import time
from statistics import median
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, LlamaConfig

import reftune
from reftune.data.collating import CompletionCollator
from reftune.training.loss import completion_loss
from reftune.training.prefix.switch import PrefixSwitch

SHAPES = {
    "llama3-8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
    },
    "tiny": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 12, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 1000, "max_position_embeddings": 4096,
    },
}  # fmt: skip
RESPONSE = 32


def batches(count: int, size: int, prompt: int, vocabulary: int, device: str) -> list[dict[str, Any]]:
    collator, found = CompletionCollator(0), []
    for _ in range(count):
        rows = []
        for _ in range(size):
            ids = torch.randint(1, vocabulary, (prompt + RESPONSE,)).tolist()
            rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:], "prompt_length": prompt})
        found.append({name: value.to(device) for name, value in collator(rows).items()})
    return found


def timed(model: Any, data: list[dict[str, Any]], mode: str, passes: int, device: str) -> list[list[float]]:
    """Seconds of every step, by pass."""
    switch = PrefixSwitch("off" if mode == "lora" else mode, None, [])
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    found: list[list[float]] = []
    for _ in range(passes):
        seconds = []
        for batch in data:
            inputs = batch if mode != "lora" else {k: v for k, v in batch.items() if k != "prompt_lengths"}
            wait()
            begin = time.perf_counter()
            if mode == "lora":
                model(**inputs).loss.backward()
            else:
                result = switch.forward(model, inputs)
                completion_loss(result.logits, result.targets).backward()
            model.zero_grad()
            wait()
            seconds.append(time.perf_counter() - begin)
        found.append(seconds)
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama3-8b", help="size of the model")
    parser.add_argument("--device", default="cuda", help="where to run")
    parser.add_argument("--prompt", type=int, default=512, help="prompt tokens")
    parser.add_argument("--batch", type=int, default=8, help="rows a step")
    parser.add_argument("--steps", type=int, default=4, help="batches a pass")
    arguments = parser.parse_args()
    device = arguments.device
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    shape = SHAPES[arguments.shape]
    layers = shape["num_hidden_layers"]
    with torch.device(device):
        base = AutoModelForCausalLM.from_config(LlamaConfig(**shape), dtype=dtype)
    base.train()
    data = batches(arguments.steps, arguments.batch, arguments.prompt, shape["vocab_size"], device)
    table = Table(title=f"{arguments.shape}, {dtype}, {device}: prompt {arguments.prompt}, batch {arguments.batch}")
    for name in ("system", "first pass s/step", "later s/step", "peak GiB"):
        table.add_column(name)
    plan: list[tuple[str, Any, str]] = [
        ("PEFT LoRA r 8 on q, v", LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"), "lora"),
    ]
    for title, where, positions in (("layer 8, l1", [8 * layers // 32], "l1"), ("all layers, f7+l7", "all", "f7+l7")):
        config = reftune.ReftConfig(r=4, layers_to_transform=where, positions=positions, task_type="CAUSAL_LM")
        plan.append((f"reftune {title}, reuse off", config, "off"))
        plan.append((f"reftune {title}, reuse auto", config, "auto"))
    for title, config, mode in plan:
        if device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats()
        model = get_peft_model(base, config)
        model.train()
        first, *later = timed(model, data, mode, 3, device)
        peak = torch.cuda.max_memory_allocated() / 1024**3 if device.startswith("cuda") else float("nan")
        table.add_row(title, f"{median(first):.4f}", f"{median(sum(later, [])):.4f}", f"{peak:.1f}")
        base = model.unload()
        base.train()
    Console().print(table)


if __name__ == "__main__":
    main()
