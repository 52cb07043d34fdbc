"""A tiny model, adapters of every kind, and their greedy answers by transformers, one by one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from reftune import ReftConfig
from reftune.adapter.config import load_adapter
from tests.cli.tiny_folder import tiny_tokenizer

WIDTH, LAYERS = 64, 3
VOCAB = len(tiny_tokenizer())
REFT: dict[str, dict[str, Any]] = {
    "l1": {"positions": "l1", "layers_to_transform": [1]},
    "l1_everywhere": {"positions": "l1", "r": 2},
    "f2l3_untied": {"positions": "f2+l3", "share_weights": False, "layers_to_transform": [0, 2]},
    "f7l7_noreft": {"positions": "f7+l7", "method": "noreft", "r": 3},
    "prompt_direft": {"positions": "prompt", "method": "direft", "layers_to_transform": [2]},
    "generated_lobireft": {"positions": "generated", "method": "lobireft", "r": 1},
    "l1_generated_consreft": {"positions": "l1+generated", "method": "consreft", "r": 1},
    "all_orthogonal": {"positions": "all", "method": "direft_orthogonal", "r": 8, "layers_to_transform": [1]},
}
LENGTHS = (1, 2, 3, 13, 40, 70)


def tiny_llama() -> PreTrainedModel:
    """Heads of 32 channels, the least that vLLM's attention takes; weights wide enough that every token counts."""
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=96, num_hidden_layers=LAYERS, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=256, tie_word_embeddings=False, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, 0.0, 0.2)
    return model.eval()


def shake(model: torch.nn.Module, seed: int) -> None:
    """Make an adapter's edits far from nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "reft_" in name or "lora_" in name:
                parameter += torch.randn(parameter.shape, generator=generator) * (0.5 if "lora_" in name else 0.4)


@dataclass(frozen=True)
class Cases:
    folder: Path

    @property
    def model(self) -> str:
        return str(self.folder / "model")

    def adapter(self, name: str) -> str:
        return str(self.folder / "adapters" / name)

    @cached_property
    def prompts(self) -> list[list[int]]:
        generator = torch.Generator().manual_seed(1)
        return [torch.randint(3, 250, (n,), generator=generator).tolist() for n in LENGTHS]

    def request(self, adapter: str | None, prompt: list[int], tokens: int = 12) -> dict[str, Any]:
        path = None if adapter is None else self.adapter(adapter)
        return {"adapter": adapter, "path": path, "prompt": prompt, "tokens": tokens}

    def all_requests(self, tokens: int = 12) -> list[dict[str, Any]]:
        """Every adapter and the base model on every prompt, shuffled."""
        names = [None, "lora", *REFT]
        pairs = [(name, prompt) for prompt in self.prompts for name in names]
        order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(2)).tolist()
        return [self.request(*pairs[index], tokens=tokens) for index in order]

    def expected(self, requests: list[dict[str, Any]]) -> list[list[int]]:
        """What transformers generates for each request, alone."""
        answers: dict[int, list[int]] = {}
        for name in {request["path"] for request in requests}:
            base = LlamaForCausalLM.from_pretrained(self.model)
            model = base if name is None else load_peft(base, name)
            for index, request in enumerate(requests):
                if request["path"] == name:
                    answers[index] = greedy(model, request["prompt"], request["tokens"])
        return [answers[index] for index in range(len(requests))]


def turns(cases: Cases) -> list[list[dict[str, Any]]]:
    """Three turns of a chat with each adapter: the next turn's prompt holds the last one's answer, as transformers gives it.

    The first answer fills the block in which the first prompt ends, so that the second turn finds it in the cache.
    """
    system = (cases.prompts[-1] * 2)[:108]
    batches: list[list[dict[str, Any]]] = []
    prompts = {name: system + cases.prompts[3] for name in (None, "l1", "l1_everywhere", "f2l3_untied", "f7l7_noreft")}
    for _ in range(3):
        batch = [cases.request(name, prompt, tokens=12) for name, prompt in prompts.items()]
        answers = cases.expected(batch)
        prompts = {
            name: prompt + answer + cases.prompts[2]
            for (name, prompt), answer in zip(prompts.items(), answers, strict=True)
        }
        batches.append(batch)
    return batches


def load_peft(base: Any, path: str) -> Any:
    folder, _, scale = path.partition("*")
    if json.loads((Path(folder) / "adapter_config.json").read_text())["peft_type"] == "LORA":
        from peft import PeftModel

        return PeftModel.from_pretrained(base, folder).eval()
    model = load_adapter(base, folder).eval()
    if scale:
        model.base_model.set_scale("default", float(scale))  # pyright: ignore[reportCallIssue]
    return model


def greedy(model: Any, prompt: list[int], tokens: int) -> list[int]:
    ids = torch.tensor([prompt])
    with torch.no_grad():
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=tokens,
            max_new_tokens=tokens, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
    return out[0, len(prompt) :].tolist()


def write_cases(folder: Path) -> Cases:
    tiny_llama().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    configs: dict[str, Any] = {
        name: ReftConfig(**{"r": 4, "init": "paper", **options}) for name, options in REFT.items()
    }
    configs["lora"] = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    for seed, (name, config) in enumerate(configs.items()):
        model = get_peft_model(LlamaForCausalLM.from_pretrained(folder / "model"), config)
        shake(model, seed)
        model.save_pretrained(folder / "adapters" / name)
    return Cases(folder)


class Engines:
    """vLLM engines, one a job, forked from a process that has imported vLLM; the end of the test run ends it."""

    def __init__(self, cache: Path):
        self.environment = {
            **os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CACHE_ROOT": str(cache),
        }  # fmt: skip
        self.command = [sys.executable, str(Path(__file__).parent / "engine.py")]
        self._parent: subprocess.Popen[str] | None = None

    def run(self, folder: Path, job: dict[str, Any], seconds: int = 280) -> tuple[dict[str, Any] | None, str]:
        """The answer of an engine (None where it did not start), and what it printed."""
        folder.mkdir(exist_ok=True)
        (folder / "job.json").write_text(json.dumps(job))
        (folder / "answer.json").unlink(missing_ok=True)
        if job.get("second_runner"):  # it is chosen before vLLM is imported
            with (folder / "printed").open("w") as printed:
                subprocess.run(
                    [*self.command, str(folder)], cwd=folder, env=self.environment, stdout=printed, stderr=printed,
                    timeout=seconds,
                )  # fmt: skip
        else:
            if self._parent is None:
                self._parent = subprocess.Popen(
                    self.command, env=self.environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
                )
            assert self._parent.stdin is not None and self._parent.stdout is not None
            self._parent.stdin.write(f"{seconds} {folder}\n")
            self._parent.stdin.flush()
            assert self._parent.stdout.readline(), "the parent of the engines has ended"
        answer = folder / "answer.json"
        return (json.loads(answer.read_text()) if answer.exists() else None), (folder / "printed").read_text()

    def close(self) -> None:
        if self._parent is not None:
            self._parent.communicate()
