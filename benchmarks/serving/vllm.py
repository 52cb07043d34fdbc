"""Tokens per CPU second of vLLM with ReFT adapters, beside the base model and beside LoRA in the same engine.

    .venv-vllm/bin/python -m benchmarks.serving.vllm [--requests 512] [--counts 1 8 64 512]

A random model of the shape of SmolLM2-135M in bfloat16 on one core, all requests at once, 16 prompt tokens and 16 new
ones each, adapters in turn. Every count of adapters is measured after the base model in the same engine; CPU seconds of
the whole process, the better of two rounds. LoRA (q_proj, v_proj, r=8) has an engine of its own, with its base rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SHAPE = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "max_position_embeddings": 1024, "tie_word_embeddings": True,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "l1": {"positions": "l1", "r": 4, "layers_to_transform": [10]},
    "prompt": {"positions": "prompt", "r": 4, "layers_to_transform": [10]},
    "l1+generated, 30 layers, r=1": {"positions": "l1+generated", "r": 1},
}


def write(folder: Path, copies: int) -> None:
    """The model, and as many copies of an adapter of each kind as the largest count."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from reftune import ReftConfig
    from tests.cli.tiny_folder import tiny_tokenizer

    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).to(torch.bfloat16)
    model.save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    configs = {kind: ReftConfig(init="paper", **options) for kind, options in KINDS.items()}
    configs["lora"] = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")  # type: ignore[assignment]
    for number, config in enumerate(configs.values()):
        base = LlamaForCausalLM.from_pretrained(folder / "model", dtype=torch.bfloat16)
        get_peft_model(base, config).save_pretrained(folder / f"{number}_0")
        for copy in range(1, copies):
            shutil.copytree(folder / f"{number}_0", folder / f"{number}_{copy}")


def measure(folder: Path, kinds: list[int], counts: list[int], requests: int, lora: bool) -> None:
    """Print a JSON line a case, from one engine."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    slots = max(counts)
    options: dict[str, Any] = {"max_lora_rank": 8} if lora else {"lora_target_modules": ["none"]}
    llm = LLM(
        str(folder / "model"), dtype="bfloat16", enforce_eager=True, enable_lora=True, max_loras=slots,
        max_cpu_loras=2 * slots, max_model_len=128, max_num_seqs=min(requests, 256), max_num_batched_tokens=4096,
        distributed_executor_backend="uni", enable_prefix_caching=False, **options,
    )  # fmt: skip
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, detokenize=False)
    prompts: Any = [{"prompt_token_ids": [(7 * n + i) % 40000 + 10 for i in range(16)]} for n in range(requests)]

    def seconds(adapters: list[LoRARequest] | None) -> float:
        chosen = None if adapters is None else [adapters[n % len(adapters)] for n in range(requests)]
        start = time.process_time()
        llm.generate(prompts, params, lora_request=chosen, use_tqdm=False)
        return time.process_time() - start

    seconds(None)
    for kind in kinds:
        for count in counts:
            adapters = [
                LoRARequest(f"{kind}_{n}", 1 + kind * 10000 + n, str(folder / f"{kind}_{n}")) for n in range(count)
            ]
            seconds(adapters)  # first use reads the folders
            rounds = [(seconds(None), seconds(adapters)) for _ in range(2)]
            base, own = (min(column) for column in zip(*rounds, strict=True))
            print(json.dumps({"kind": kind, "adapters": count, "base": base, "seconds": own, "tokens": 32 * requests}))
            sys.stdout.flush()


def main() -> None:
    """Measure ReFT, then LoRA, each in a process of its own, and print a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=512)
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 8, 64, 512])
    parser.add_argument("--engine", nargs=2, metavar=("FOLDER", "KIND"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    names = [*KINDS, "LoRA q_proj, v_proj, r=8"]
    if asked.engine:
        folder, kind = asked.engine
        lora = kind == "lora"
        kinds = [len(KINDS)] if lora else list(range(len(KINDS)))
        return measure(Path(folder), kinds, asked.counts, asked.requests, lora)
    environment = {
        **os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR",
    }  # fmt: skip
    print("| adapters | kind | base, tokens / CPU s | with adapters | ratio |\n| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as scratch:
        write(Path(scratch), max(asked.counts))
        for kind in ("reft", "lora"):
            counts = [str(count) for count in asked.counts]
            command = [sys.executable, "-m", "benchmarks.serving.vllm", "--requests", str(asked.requests), "--counts"]
            command += [*counts, "--engine", scratch, kind]
            with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
                for line in process.stdout or ():
                    if line.startswith("{"):
                        row = json.loads(line)
                        base, own = (row["tokens"] / row[key] for key in ("base", "seconds"))
                        cells = (row["adapters"], names[row["kind"]], f"{base:.0f}", f"{own:.0f}", f"{own / base:.2f}")
                        print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    main()
