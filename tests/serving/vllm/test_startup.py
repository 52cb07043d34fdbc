"""What a server of ReFT adapters does not start with."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from reftune import ReftuneError
from reftune.serving.vllm.requested import ModelShape
from reftune.serving.vllm.startup import refuse
from tests.serving.vllm.cases import LAYERS, WIDTH, Cases, Engines
from tests.serving.vllm.test_engines import SMALL

pytestmark = pytest.mark.timeout(600)
DRAFT = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}
CONNECTOR = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}


@pytest.mark.parametrize(
    ("options", "sabotage", "said"),
    [
        ({}, None, None),
        ({"kv_transfer_config": CONNECTOR}, None, "kv_transfer_config: a connector may name blocks"),
        ({"kv_offloading_size": 0.01}, None, "kv_transfer_config: a connector may name blocks"),
        ({"speculative_config": DRAFT, "max_num_batched_tokens": 512}, None, "speculative_config: a draft is made"),
        ({"runner": "pooling"}, None, "runner: only generation is served"),
        ({"additional_config": {"reftune": {"forms": "dense"}}}, None, "reftune.forms is no setting"),
        ({"additional_config": {"reftune": {"form": "fast"}}}, None, "give auto, planned or dense"),
        ({}, "hooks", "self-test: two opposite edits of the last layer gave the tokens"),
        ({}, "cache_of_adapters", "vLLM made its own cache of adapters"),
        ({}, "signature", "set_active_loras takes (self, batch), not (self, input_batch, num_scheduled_tokens, ...)"),
    ],
)
def test_an_engine_ends_with_one_message_where_answers_could_be_wrong(
    options: dict[str, Any], sabotage: str | None, said: str | None, cases: Cases, engines: Engines, tmp_path: Path
) -> None:
    job = {
        "model": cases.model, "options": SMALL | options, "rounds": [], "sabotage": sabotage,
        "environment": {"REFTUNE_ADAPTERS": str(cases.folder / "adapters")},
    }  # fmt: skip
    answer, printed = engines.run(tmp_path, job)
    if said is None:
        assert answer is not None, printed[-4000:]
        return
    last = printed.strip().splitlines()[-1]
    assert answer is None and last.startswith("reftune.errors.ReftuneError: ") and said in last, printed[-4000:]


def test_a_changed_vllm_without_adapters_to_serve_starts_and_loads_no_reft_folder(
    cases: Cases, engines: Engines, tmp_path: Path
) -> None:
    rounds = [[cases.request(None, cases.prompts[2])], [cases.request("l1", cases.prompts[2])]]
    job = {"model": cases.model, "options": SMALL, "rounds": rounds, "sabotage": "signature"}
    answer, printed = engines.run(tmp_path, job)
    assert "ReFT folders cannot be loaded" in printed
    assert answer is None or isinstance(answer["rounds"][1], str), answer


def configuration(**changed: Any) -> Any:
    parallel = {"enable_dbo": False, "ubatch_size": 0, "prefill_context_parallel_size": 1}
    model = {"runner_type": "generate", "is_encoder_decoder": False, "is_diffusion": False}
    return SimpleNamespace(
        speculative_config=None, kv_transfer_config=None,
        parallel_config=SimpleNamespace(**parallel | {k: v for k, v in changed.items() if k in parallel}),
        model_config=SimpleNamespace(**model | {k: v for k, v in changed.items() if k in model}),
    )  # fmt: skip


@pytest.mark.parametrize(
    "changed",
    [{"enable_dbo": True}, {"ubatch_size": 2}, {"prefill_context_parallel_size": 2}, {"is_encoder_decoder": True},
     {"is_diffusion": True}],
)  # fmt: skip
def test_what_no_engine_of_a_cpu_can_be_is_refused_by_its_configuration(changed: dict[str, Any]) -> None:
    refuse(configuration())
    with pytest.raises(ReftuneError, match=f"ReFT adapters and {next(iter(changed))}: "):
        refuse(configuration(**changed))


def test_a_planned_form_is_refused_where_graphs_would_replay_it(cases: Cases) -> None:
    from torch import nn
    from vllm.config import CUDAGraphMode

    from reftune.serving.vllm.worker import make_slots

    for mode in (CUDAGraphMode.PIECEWISE, CUDAGraphMode.FULL, CUDAGraphMode.FULL_AND_PIECEWISE):
        config = SimpleNamespace(
            additional_config={"reftune": {"form": "planned"}},
            compilation_config=SimpleNamespace(cudagraph_mode=mode),
        )
        with pytest.raises(ReftuneError, match="form='planned' with CUDA graphs"):
            make_slots(nn.Module(), ModelShape(LAYERS, WIDTH), config, torch.device("cpu"))
