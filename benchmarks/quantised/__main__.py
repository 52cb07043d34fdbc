"""Memory and time of a training step on quantised bases, on a CPU, for an edit and LoRA; writes RESULTS.md.

Usage: .venv-quantised/bin/python -m benchmarks.quantised       (`make test-quantised` builds that environment)

Each figure is of a process of its own, three steps of 4 rows of 64 tokens on SmolLM2-135M.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import reftune
from reftune.comparison.peak_memory import PeakMemory
from reftune.engine.quantised import Unpacked
from reftune.models import bundled_folder
from reftune.output.files import write_text

HERE = Path(__file__).parent
BASES = {
    "float32": "",
    "nf4": "bitsandbytes",
    "int8": "bitsandbytes",
    "int8 torchao": "torchao",
    "int8 quanto": "optimum-quanto",
}
ADAPTERS = {
    "LoRA r8": lambda: LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    "DiReFT r1": lambda: reftune.ReftConfig(
        method="direft", r=1, layers_to_transform="all", positions="l1+generated", task_type="CAUSAL_LM"
    ),
}
MIB = 2**20


def quantisation(name: str) -> Any:
    if name == "nf4":
        return transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
    if name == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    if name == "int8 torchao":
        from torchao.quantization import Int8WeightOnlyConfig  # pyright: ignore[reportMissingImports]

        return transformers.TorchAoConfig(Int8WeightOnlyConfig())
    return transformers.QuantoConfig(weights="int8") if name == "int8 quanto" else None


def held(value: Any) -> dict[int, int]:
    """Bytes of every storage that a tensor, or a tensor made of others, keeps, by where it lies."""
    if hasattr(value, "__tensor_flatten__"):
        parts = [getattr(value, name) for name in value.__tensor_flatten__()[0]]
        return {key: size for part in parts for key, size in held(part).items()}
    return {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()} if isinstance(value, Tensor) else {}


def base_bytes(model: nn.Module) -> int:
    storages: dict[int, int] = {}
    for module in model.modules():
        for value in (*module._parameters.values(), *module._buffers.values()):
            storages |= held(value)
            for extra in (getattr(value, "SCB", None), getattr(getattr(value, "quant_state", None), "absmax", None)):
                storages |= held(extra)
    return sum(storages.values())


def measure(base_name: str, adapter: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    base: Any = transformers.AutoModelForCausalLM.from_pretrained(
        bundled_folder(), quantization_config=quantisation(base_name), device_map={"": "cpu"}, dtype=torch.float32
    )
    Unpacked(base)
    ids = torch.randint(100, 40_000, (4, 64))
    labels = ids.clone()
    labels[:, :32] = -100
    bytes_of_base = base_bytes(base)
    model = get_peft_model(base, ADAPTERS[adapter]())
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    gc.collect()
    peak, begun = PeakMemory(own_process=True), time.process_time()
    for _ in range(3):
        model(input_ids=ids, labels=labels).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return {
        "base": bytes_of_base,
        "step": peak.bytes(),
        "seconds": (time.process_time() - begun) / 3,
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


def document(found: dict[str, dict[str, Any]]) -> str:
    packages = ", ".join(f"{name} {version(name)}" for name in dict.fromkeys(BASES.values()) if name)
    lines = [
        "# Quantised bases on a CPU", "",
        f"`python -m benchmarks.quantised` on {platform.machine()}, one thread of a shared machine: torch {torch.__version__}, "
        f"{packages}. SmolLM2-135M, three steps of 4 rows of 64 tokens, computed in float32, each line a process of its own. "
        "*base* is what its tensors hold (113 MB of it the embedding, which is not quantised), *step* the most that training "
        "took beyond that, of resident memory. It is rough, by some 150 MiB from run to run: weights that are not quantised are "
        "mapped from their file and counted in *step* when they are first read (all 513 MiB in float32), and nothing is read "
        "from it of edits against LoRA. What differs is the base.", "",
        "| base | adapter | parameters | base, MiB | step, MiB | seconds a step |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for key, one in found.items():
        base, adapter = key.split("/")
        lines.append(
            f"| {base} | {adapter} | {one['parameters']:,} | {one['base'] / MIB:.0f} | {one['step'] / MIB:.0f} | "
            f"{one['seconds']:.1f} |"
        )
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", nargs=2, metavar=("BASE", "ADAPTER"), help="measure one and print it")
    arguments = parser.parse_args()
    if arguments.one:
        warnings.simplefilter("ignore")
        print("RESULT " + json.dumps(measure(*arguments.one)))
        return
    found = {}
    for base in BASES:
        for adapter in ADAPTERS:
            command = [sys.executable, "-m", "benchmarks.quantised", "--one", base, adapter]
            done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
            lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
            if done.returncode or not lines:
                raise RuntimeError(f"{base}, {adapter} failed:\n{done.stderr[-2000:]}")
            found[f"{base}/{adapter}"] = json.loads(lines[0].removeprefix("RESULT "))
            print(base, adapter, found[f"{base}/{adapter}"], flush=True)
    write_text(HERE / "RESULTS.md", document(found))


if __name__ == "__main__":
    main()
