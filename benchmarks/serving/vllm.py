"""Tokens a CPU second of vLLM with ReFT adapters, and time to the first token, beside the base model and LoRA.

    .venv-vllm/bin/python -m benchmarks.serving.vllm [--requests 128] [--cases prompt decode active zipf past many lora]

A random model of the shape of SmolLM2-135M in bfloat16 on one core, all requests of a case at once, 16 prompt tokens and
16 new ones each. Every case is measured in turn with the base model in the same engine; CPU seconds of the whole process,
the better of two rounds; seconds to the first token are of all requests of both. The first use of a case reads its
adapters from disk and is reported apart. LoRA (q_proj, v_proj, r=8) has an engine of its own, with its base rounds.
``--out FILE`` also writes JSON lines, of which ``python -m benchmarks.serving.plots FILE`` draws the picture.
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
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

SHAPE = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "max_position_embeddings": 1024, "tie_word_embeddings": True,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "l1, r 4": {"positions": "l1", "r": 4, "layers_to_transform": [10]},
    "prompt, r 4": {"positions": "prompt", "r": 4, "layers_to_transform": [10]},
    "l1+generated, 30 layers, r 1": {"positions": "l1+generated", "r": 1},
    "all, r 4": {"positions": "all", "r": 4, "layers_to_transform": [10]},
}
LORA = "LoRA q_proj, v_proj, r 8"
L1 = next(iter(KINDS))
SLOTS, CACHE = 64, 128
"""Of the cases ``past`` and ``many``: adapters in a batch, and in vLLM's cache."""


@dataclass(frozen=True)
class Case:
    """Requests for adapters of one kind.

    Attributes:
        case: what is varied.
        kind: of adapter.
        adapters: as many as there are, evenly asked from all over the list, or by Zipf's law.
        requests: at once.
        zipf: the k-th adapter with a probability of 1 / k.
        moving: each round asks for the adapters behind those of the last.
    """

    case: str
    kind: str
    adapters: int
    requests: int
    zipf: bool = False
    moving: bool = False

    def chosen(self, turn: int) -> list[int]:
        """The adapter of each request of one round."""
        import torch

        if self.zipf:
            draw = torch.Generator().manual_seed(turn)
            weights = 1 / torch.arange(1, self.adapters + 1)
            return torch.multinomial(weights, self.requests, replacement=True, generator=draw).tolist()
        step = 1 if self.moving else max(1, self.adapters // self.requests)
        first = turn * self.requests if self.moving else 0
        return [(first + number * step) % self.adapters for number in range(self.requests)]


def cases_of(names: list[str], counts: list[int], requests: int) -> dict[str, list[Case]]:
    """The cases of each engine that is needed: ``reft``, ``lora``, and ``small``, whose cache is smaller than the lot."""
    kinds = list(KINDS)
    every = {
        "prompt": ("reft", [Case("registered", kind, count, requests) for kind in kinds[:2] for count in counts]),
        "decode": ("reft", [Case("registered", kind, count, requests) for kind in kinds[2:] for count in counts]),
        "active": ("reft", [Case("active in a batch of 64", L1, count, 64) for count in (1, 4, 16, 64)]),
        "zipf": ("reft", [Case("Zipf", L1, 1000, requests, zipf=True)]),
        "past": (
            "small",
            [
                Case("past the cache, in turn", L1, 1000, requests, moving=True),
                Case("past the cache, Zipf", L1, 1000, requests, zipf=True),
            ],
        ),
        "many": ("small", [Case("registered, small cache", L1, count, requests) for count in (1000, 10_000)]),
        "lora": ("lora", [Case("registered", LORA, count, requests) for count in counts]),
    }
    found: dict[str, list[Case]] = {}
    for name in names:
        engine, cases = every[name]
        found.setdefault(engine, []).extend(cases)
    return found


def write(folder: Path, cases: list[Case]) -> None:
    """The model, and of each kind as many folders of one adapter as its largest case asks for."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from reftune import ReftConfig
    from tests.cli.tiny_folder import tiny_tokenizer

    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).to(torch.bfloat16)
    model.save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    configs: dict[str, Any] = {kind: ReftConfig(init="paper", **options) for kind, options in KINDS.items()}
    configs[LORA] = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    for kind, config in configs.items():
        copies = max((case.adapters for case in cases if case.kind == kind), default=0)
        if copies:
            base = LlamaForCausalLM.from_pretrained(folder / "model", dtype=torch.bfloat16)
            get_peft_model(base, config).save_pretrained(folder / kind / "0")
        for copy in range(1, copies):
            shutil.copytree(folder / kind / "0", folder / kind / str(copy), copy_function=os.link)


def measure(folder: Path, engine: str, cases: list[Case]) -> None:
    """Print a JSON line a case, from one engine."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    slots = SLOTS if engine == "small" else max(case.adapters for case in cases if not case.zipf)
    options: dict[str, Any] = {"max_lora_rank": 8} if engine == "lora" else {"lora_target_modules": ["none"]}
    llm = LLM(
        str(folder / "model"), dtype="bfloat16", enforce_eager=True, enable_lora=True, max_loras=slots,
        max_cpu_loras=CACHE if engine == "small" else 2 * slots, max_model_len=128,
        max_num_seqs=SLOTS if engine == "small" else 256, max_num_batched_tokens=4096, disable_log_stats=False,
        distributed_executor_backend="uni", enable_prefix_caching=False, **options,
    )  # fmt: skip
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, detokenize=False)
    numbers = {kind: 1 + 100_000 * index for index, kind in enumerate((*KINDS, LORA))}

    def run(case: Case, turn: int | None) -> tuple[float, list[float]]:
        """CPU seconds, and those to each first token; without a turn, of the base."""
        prompts: Any = [
            {"prompt_token_ids": [(7 * n + i) % 40000 + 10 for i in range(16)]} for n in range(case.requests)
        ]
        asked = None
        if turn is not None:
            chosen, first = case.chosen(turn), numbers[case.kind]
            asked = [LoRARequest(f"{case.kind}/{n}", first + n, str(folder / case.kind / str(n))) for n in chosen]
        start = time.process_time()
        outputs = llm.generate(prompts, params, lora_request=asked, use_tqdm=False)
        return time.process_time() - start, [output.metrics.first_token_latency for output in outputs]

    run(cases[0], None)
    for case in cases:
        cold, _ = run(case, 0)
        rounds = [(run(case, None), run(case, turn)) for turn in (1, 2)]
        base, own = (min(seconds for seconds, _ in column) for column in zip(*rounds, strict=True))
        base_first, first = (sum((waits for _, waits in column), []) for column in zip(*rounds, strict=True))
        tokens = 32 * case.requests
        found = {
            "different": len(set(case.chosen(2))), "base, tokens a CPU second": tokens / base,
            "tokens a CPU second": tokens / own, "of base": base / own, "first use": tokens / cold,
            "first token, s": median(first), "first token, p95, s": quantiles(first, n=20)[-1],
            "base: first token, s": median(base_first), "base: first token, p95, s": quantiles(base_first, n=20)[-1],
        }  # fmt: skip
        print(json.dumps(asdict(case) | {name: round(number, 3) for name, number in found.items()}))
        sys.stdout.flush()


def main() -> None:
    """Measure each engine in a process of its own, and print a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 8, 64, 512])
    names = ["prompt", "decode", "active", "zipf", "past", "many", "lora"]
    parser.add_argument("--cases", nargs="+", choices=names, default=names)
    parser.add_argument("--out", type=Path, help="also write the JSON lines there")
    parser.add_argument("--engine", nargs=2, metavar=("FOLDER", "KIND"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    cases = cases_of(asked.cases, asked.counts, asked.requests)
    if asked.engine:
        folder, engine = asked.engine
        return measure(Path(folder), engine, cases[engine])
    environment = {
        **os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR",
    }  # fmt: skip
    columns = ("case", "kind", "adapters", "different", "base, tokens a CPU second", "tokens a CPU second", "of base")
    columns += (
        "first use",
        "first token, s",
        "first token, p95, s",
        "base: first token, s",
        "base: first token, p95, s",
    )
    print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    lines = []
    with tempfile.TemporaryDirectory() as scratch:
        write(Path(scratch), sum(cases.values(), []))
        for engine in cases:
            command = [sys.executable, "-m", "benchmarks.serving.vllm", "--requests", str(asked.requests)]
            command += ["--counts", *map(str, asked.counts), "--cases", *asked.cases, "--engine", scratch, engine]
            with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
                for line in process.stdout or ():
                    if line.startswith("{"):
                        lines.append(line)
                        print(f"| {' | '.join(str(json.loads(line)[column]) for column in columns)} |", flush=True)
                        if asked.out:
                            asked.out.write_text("".join(lines))


if __name__ == "__main__":
    main()
