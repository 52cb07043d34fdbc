"""vLLM engines against transformers, one by one: one engine a configuration, each in a process of its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.serving.vllm.cases import Cases, Engines, turns

pytestmark = pytest.mark.timeout(600)
SMALL = {
    "enforce_eager": True, "max_loras": 3, "max_cpu_loras": 4, "max_lora_rank": 8, "max_num_seqs": 16, "block_size": 32,
    "max_num_batched_tokens": 32,
}  # fmt: skip


def answers(rounds: list[Any], index: int) -> list[list[int]]:
    assert isinstance(rounds[index], list), rounds[index]
    return [answer["tokens"] for answer in rounds[index]]


def cached(rounds: list[Any], index: int) -> list[int]:
    return [answer["cached"] for answer in rounds[index]]


@pytest.fixture(scope="module")
def requests(cases: Cases) -> list[dict[str, Any]]:
    return cases.all_requests()


@pytest.fixture(scope="module")
def expected(cases: Cases, requests: list[dict[str, Any]]) -> list[list[int]]:
    return cases.expected(requests)


def test_mixed_batches_chunks_slots_and_a_warm_cache_give_the_answers_of_transformers(
    cases: Cases, engines: Engines, requests: list[dict[str, Any]], expected: list[list[int]], tmp_path: Path
) -> None:
    """Ten adapters (a LoRA adapter among them) and the base model through three slots, 32 tokens a step.

    Then chats whose turns end elsewhere each time; strengths; adapters that are refused, replaced and deleted.
    """
    broken, gone, changing = tmp_path / "broken", tmp_path / "gone", tmp_path / "changing"
    shutil.copytree(cases.adapter("l1"), broken)
    (broken / "adapter_model.safetensors").write_bytes(b"no safetensors")
    for folder in (gone, changing):
        shutil.copytree(cases.adapter("l1"), folder)
    one = cases.request("l1", cases.prompts[3])
    half = {**one, "adapter": "half", "path": f"{cases.adapter('l1')}*0.5"}
    chat = turns(cases)
    refused = {"broken": broken}
    for name, change in {
        "inside": {"component": "mlp_output"}, "activation": {"act_fn": "gelu"}, "saved": {"modules_to_save": ["lm_head"]},
    }.items():  # fmt: skip
        refused[name] = tmp_path / name
        shutil.copytree(cases.adapter("l1"), refused[name])
        config = refused[name] / "adapter_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | change))

    def ask(name: str, path: Path) -> dict[str, Any]:
        return {**one, "adapter": name, "path": str(path)}

    job = {
        "model": cases.model,
        "options": SMALL,
        "rounds": [
            requests, requests, *chat, [half],
            *([ask(name, path)] for name, path in refused.items()),
            [ask("gone", gone), ask("changing", changing)],
            {"replace": [None, str(gone)]},
            {"replace": [cases.adapter("f7l7_noreft"), str(changing)]},
            requests[:20],  # which throws both out of slots and cache
            [ask("gone", gone), ask("changing", changing), one],
            {"beam": one},
        ],
    }  # fmt: skip
    answer, printed = engines.run(tmp_path, job)
    assert answer is not None, printed[-4000:]
    rounds = answer["rounds"]
    assert answers(rounds, 0) == answers(rounds, 1) == expected
    assert sum(cached(rounds, 1)) > sum(cached(rounds, 0)) > 0
    for index, batch in enumerate(chat):
        assert answers(rounds, 2 + index) == cases.expected(batch)
    first_turn = dict(zip([request["adapter"] for request in chat[0]], cached(rounds, 2), strict=True))
    assert max(first_turn.values()) > 0 or sum(cached(rounds, 3)) > 0
    assert answers(rounds, 5) == cases.expected([half])
    assert "safetensors" in rounds[6]
    assert "component='mlp_output'" in rounds[7]
    assert "not linear" in rounds[8]
    assert "modules_to_save" in rounds[9]
    before = cases.expected([one])[0]
    assert answers(rounds, 10) == [before, before]
    assert answers(rounds, 13) == expected[:20]
    assert answers(rounds, 14) == [before] * 3
    assert "beam search" in rounds[15]
    assert answer["additional"]["reftune"]["form"] == "planned"


def test_the_dense_form_is_right_under_preemption_and_shares_prefixes_across_adapters(
    cases: Cases, engines: Engines, tmp_path: Path
) -> None:
    requests = cases.all_requests(tokens=30)[:32]  # long enough to need a further block each
    shared = (cases.prompts[-1] * 2)[:100]
    names = [None, "l1", "l1_everywhere", "f2l3_untied"]
    one_by_one = [[cases.request(name, shared)] for name in names]
    job = {
        "model": cases.model,
        "options": {
            **SMALL, "max_loras": 12, "max_cpu_loras": 12, "max_num_batched_tokens": 64, "num_gpu_blocks_override": 12,
            "additional_config": {"reftune": {"form": "dense"}},
        },
        "rounds": [requests, *one_by_one],
    }  # fmt: skip
    answer, printed = engines.run(tmp_path, job)
    assert answer is not None, printed[-4000:]
    assert answers(answer["rounds"], 0) == cases.expected(requests)
    assert answer["preemptions"] > 0
    for index, batch in enumerate(one_by_one):
        assert answers(answer["rounds"], 1 + index) == cases.expected(batch)
    # 100 tokens are three whole blocks: edits at the prompt's end leave them the base model's, edits at its start do not.
    assert [cached(answer["rounds"], 1 + index) for index in range(4)][1:] == [[96], [96], [0]]


def test_the_second_model_runner_with_the_triton_kernel_gives_the_answers_of_transformers(
    cases: Cases, engines: Engines, tmp_path: Path
) -> None:
    requests = cases.all_requests(tokens=4)
    options = {**SMALL, "max_num_batched_tokens": 64, "additional_config": {"reftune": {"form": "dense"}}}
    job = {"model": cases.model, "options": options, "rounds": [requests], "second_runner": True}
    answer, printed = engines.run(tmp_path, job, 500)
    assert answer is not None, printed[-4000:]
    assert answers(answer["rounds"], 0) == cases.expected(requests)
    assert ".gpu.model_runner" in answer["runner"] or ".cpu.model_runner" in answer["runner"], answer["runner"]


@pytest.mark.parametrize("form", ["dense", "planned"])
def test_a_compiled_graph_keeps_the_edits(form: str, cases: Cases, engines: Engines, tmp_path: Path) -> None:
    requests = [request for request in cases.all_requests(tokens=6) if request["adapter"] != "lora"]
    options = {
        "max_loras": 12, "max_cpu_loras": 12, "max_num_batched_tokens": 64, "lora_target_modules": ["none"],
        "block_size": 32, "max_num_seqs": 16, "additional_config": {"reftune": {"form": form}},
    }  # fmt: skip
    job = {
        "model": cases.model, "options": options, "rounds": [requests], "compile": True,
        "environment": {"VLLM_CPU_CI_ENV": "1"},
    }  # fmt: skip
    answer, printed = engines.run(tmp_path, job)
    assert answer is not None, printed[-4000:]
    assert answer["mode"] != "0"
    assert answers(answer["rounds"], 0) == cases.expected(requests)


def test_turns_of_a_chat_are_the_same_without_a_prefix_cache_and_wrong_with_keys_of_vllms_own(
    cases: Cases, engines: Engines, tmp_path: Path
) -> None:
    chat = turns(cases)
    expected = [cases.expected(batch) for batch in chat]
    found = {}
    for name, options, sabotage in (
        ("cached", {}, None), ("not cached", {"enable_prefix_caching": False}, None), ("stock keys", {}, "stock_keys"),
    ):  # fmt: skip
        job = {"model": cases.model, "options": SMALL | options, "rounds": chat, "sabotage": sabotage}
        answer, printed = engines.run(tmp_path / name, job)
        assert answer is not None, printed[-4000:]
        found[name] = answer["rounds"]
    for turn, right in enumerate(expected):
        assert answers(found["cached"], turn) == answers(found["not cached"], turn) == right
        assert sum(cached(found["not cached"], turn)) == 0
    assert sum(cached(found["cached"], 1)) > 0
    assert [answers(found["stock keys"], turn) for turn in range(3)] != expected


@pytest.mark.parametrize(
    ("parallel", "form"), [("tensor_parallel_size", "planned"), ("pipeline_parallel_size", "dense")]
)
def test_two_processes_give_the_answers_of_one(
    parallel: str, form: str, cases: Cases, engines: Engines, requests: list[dict[str, Any]],
    expected: list[list[int]], tmp_path: Path,
) -> None:  # fmt: skip
    options = {
        **SMALL, "max_loras": 12, "max_cpu_loras": 12, parallel: 2, "distributed_executor_backend": "mp", "additional_config": {"reftune": {"form": form}},
    }  # fmt: skip
    job = {
        "model": cases.model, "options": options, "rounds": [requests, requests],
        "environment": {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "MAKE_ROOM_FOR_STAGES": "1"},
    }  # fmt: skip
    answer, printed = engines.run(tmp_path, job)
    assert answer is not None, printed[-6000:]
    assert answers(answer["rounds"], 0) == answers(answer["rounds"], 1) == expected


def test_the_base_model_s_rows_are_spared_by_a_lora_adapter_in_the_last_slot() -> None:
    lora_ops = pytest.importorskip("vllm.lora.ops.torch_ops.lora_ops", reason="make test-vllm runs these")
    from reftune.serving.vllm.worker import spare_base_rows

    inputs, weights = torch.ones(3, 4), torch.stack([torch.ones(2, 4), torch.full((2, 4), 2.0)])
    indices, right = torch.tensor([0, -1, 1]), torch.tensor([[4.0, 4.0], [0.0, 0.0], [8.0, 8.0]])

    def shrunk(function: Any, *more: Any) -> torch.Tensor:
        output = torch.full((3, 2), 7.0)
        function(inputs, weights, output, *more, indices, *([3, 1, 3] if more else []), 1.0)
        return output

    stock = lora_ops.bgmv_shrink
    spare_base_rows()
    spare_base_rows()
    try:
        assert torch.equal(shrunk(lora_ops.bgmv_shrink), right)
        assert torch.equal(shrunk(lora_ops.sgmv_shrink, torch.arange(3), torch.ones(3, dtype=torch.long)), right)
    finally:
        assert lora_ops.bgmv_shrink.__wrapped__ is stock
        punica = pytest.importorskip("vllm.lora.punica_wrapper.punica_cpu")
        lora_ops.bgmv_shrink = punica.bgmv_shrink = stock
    if not torch.equal(shrunk(stock), right):  # else vLLM has mended it
        assert torch.equal(shrunk(stock)[1], right[2])
