"""One adapter a client that must answer its own name, through fewer slots and a smaller cache than there are adapters."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaForCausalLM

from tests.serving.adapters import save_adapter
from tests.serving.vllm.cases import Cases, Engines, greedy, load_peft

pytestmark = pytest.mark.timeout(600)
CLIENTS, NEW, SLOTS, CACHE, REQUESTS = 64, 3, 8, 12, 5000
POSITIONS = ("l1", "l1+generated", "all", "f2+l2")


def named(cases: Cases, root: Path) -> dict[str, list[int]]:
    """Adapter folders, and what each answers to the one prompt by transformers; no two are alike."""
    base: Any = LlamaForCausalLM.from_pretrained(cases.model)
    answers: dict[str, list[int]] = {}
    seed = 0
    while len(answers) < CLIENTS:
        folder = root / str(seed)
        save_adapter(base, folder, seed, 3.0, r=2, positions=POSITIONS[len(answers) % len(POSITIONS)])
        answer, seed = greedy(load_peft(base, str(folder)), cases.prompts[4], NEW), seed + 1
        base = LlamaForCausalLM.from_pretrained(cases.model)
        if answer not in answers.values():
            answers[str(folder)] = answer
    return answers


def test_thousands_of_answers_over_sixty_four_adapters_are_each_ones_own(
    cases: Cases, engines: Engines, tmp_path: Path
) -> None:
    names = named(cases, tmp_path / "adapters")
    asked = random.Random(1).choices(list(names), k=REQUESTS)

    def mixed_up(requests: list[str], sabotage: str | None) -> tuple[int, dict[str, Any]]:
        batch = [{"adapter": path, "path": path, "prompt": cases.prompts[4], "tokens": NEW} for path in requests]
        options = {
            "enforce_eager": True, "max_loras": SLOTS, "max_cpu_loras": CACHE, "max_num_seqs": 64, "block_size": 32,
            "lora_target_modules": ["none"],
        }  # fmt: skip
        job = {"model": cases.model, "options": options, "rounds": [batch], "sabotage": sabotage}
        answer, printed = engines.run(tmp_path, job)
        assert answer is not None and isinstance(answer["rounds"][0], list), printed[-4000:]
        heard = [one["tokens"] for one in answer["rounds"][0]]
        return sum(one != names[path] for one, path in zip(heard, requests, strict=True)), answer

    wrong, answer = mixed_up(asked, None)
    assert wrong == 0
    assert answer["activated"] > 5 * CLIENTS and answer["loaded"] > 2 * CLIENTS  # slots and cache changed hands
    assert sum(one["cached"] for one in answer["rounds"][0]) > 0
    assert mixed_up(asked[:500], "mix_up")[0] > 0
