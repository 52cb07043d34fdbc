"""Runs one vLLM engine in a process of its own: `python engine.py JOB ANSWERS`, both JSON.

A job has `model`, `options` of `LLM`, and `rounds`: lists of requests {prompt, adapter, path, tokens}, each round
generated in one batch. A round may instead be {"replace": [from, to]}, {"write": [path, text]} or {"beam": request}.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import types
from pathlib import Path
from typing import Any


def before_vllm(job: dict[str, Any]) -> None:
    os.environ.update(job.get("environment", {}))
    if job.get("second_runner"):  # its Triton kernels run in Triton's interpreter; "cpu" is a stand-in for a driver
        os.environ.update(TRITON_INTERPRET="1", VLLM_USE_V2_MODEL_RUNNER="1")
        import triton.backends

        driver = types.SimpleNamespace(is_active=lambda: True)
        triton.backends.backends["cpu"] = types.SimpleNamespace(driver=driver, compiler=None)


def after_import(job: dict[str, Any]) -> None:
    if job.get("compile"):  # vLLM compiles nothing on a CPU as soon as LoRA is on; ReFT alone needs no such thing
        from vllm.platforms.cpu import CpuPlatform

        stock = CpuPlatform.check_and_update_config.__func__  # type: ignore[attr-defined]

        def check_and_update_config(cls: Any, vllm_config: Any) -> None:
            lora, vllm_config.lora_config = vllm_config.lora_config, None
            try:
                stock(cls, vllm_config)
            finally:
                vllm_config.lora_config = lora

        CpuPlatform.check_and_update_config = classmethod(check_and_update_config)  # type: ignore[assignment]
    if job.get("sabotage") == "hooks":
        from reftune.serving.vllm import slots

        slots.hook_planned = lambda *args: None  # type: ignore[assignment]
    if job.get("sabotage") == "signature":
        from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

        LoRAModelRunnerMixin.set_active_loras = lambda self, batch: None  # type: ignore[assignment]


def main(job_file: str, answer_file: str) -> None:
    job = json.loads(Path(job_file).read_text())
    before_vllm(job)
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import BeamSearchParams

    after_import(job)
    llm = LLM(
        job["model"], dtype="float32", enable_lora=True, max_model_len=256, distributed_executor_backend="uni",
        disable_log_stats=False, **job["options"],
    )  # fmt: skip
    ids: dict[str, int] = {}

    def lora(request: dict[str, Any]) -> LoRARequest | None:
        if request.get("path") is None:
            return None
        return LoRARequest(request["adapter"], ids.setdefault(request["adapter"], len(ids) + 1), request["path"])

    rounds: list[Any] = []
    for batch in job["rounds"]:
        try:
            if isinstance(batch, dict) and "replace" in batch:
                source, target = batch["replace"]
                shutil.rmtree(target, ignore_errors=True)
                if source:
                    shutil.copytree(source, target)
                rounds.append("replaced")
            elif isinstance(batch, dict) and "beam" in batch:
                request = batch["beam"]
                params = BeamSearchParams(beam_width=2, max_tokens=3)
                llm.beam_search([{"prompt_token_ids": request["prompt"]}], params, lora_request=lora(request))
                rounds.append("searched")
            else:
                answers = llm.generate(
                    [{"prompt_token_ids": request["prompt"]} for request in batch],
                    [
                        SamplingParams(temperature=0, max_tokens=r["tokens"], ignore_eos=True, detokenize=False)
                        for r in batch
                    ],
                    lora_request=[lora(request) for request in batch],
                    use_tqdm=False,
                )
                rounds.append(
                    [{"tokens": list(a.outputs[0].token_ids), "cached": a.num_cached_tokens or 0} for a in answers]
                )
        except Exception as error:
            rounds.append(f"{type(error).__name__}: {error}")
    metrics = {m.name: getattr(m, "value", None) for m in llm.get_metrics()}
    core = llm.llm_engine.engine_core.engine_core  # type: ignore[attr-defined]
    config = core.vllm_config
    answer = {
        "rounds": rounds,
        "preemptions": metrics.get("vllm:num_preemptions"),
        "additional": config.additional_config,
        "mode": str(config.compilation_config.mode),
        "runner": type(core.model_executor.driver_worker.worker.model_runner).__module__,
    }
    Path(answer_file).write_text(json.dumps(answer))


if __name__ == "__main__":
    main(*sys.argv[1:])
