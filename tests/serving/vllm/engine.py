"""Runs vLLM engines in processes of their own: `python engine.py FOLDER` one, `python engine.py` one for each folder
that is named on its input, forked from a process that has imported vLLM once.

A folder holds `job.json` and gets `answer.json` and `printed`. A job has `model`, `options` of `LLM`, and `rounds`: lists
of requests {prompt, adapter, path, tokens}, each round generated in one batch. A round may instead be
{"replace": [from, to]} or {"beam": request}.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import traceback
import types
from pathlib import Path
from typing import Any

COUNTS = {"activated": 0, "loaded": 0}


def before_vllm(job: dict[str, Any]) -> None:
    for name, value in job.get("environment", {}).items():
        os.environ.pop(name, None) if value is None else os.environ.update({name: value})
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
    if job.get("sabotage") == "stock_keys":
        from reftune.serving.vllm import block_keys

        block_keys.keyed = lambda stock, known_of: stock  # type: ignore[assignment]
    if job.get("sabotage") == "cache_of_adapters":
        from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

        def load_lora_model(self: Any, model: Any, vllm_config: Any, device: Any) -> Any:
            self.lora_manager = object()
            return model

        LoRAModelRunnerMixin.load_lora_model = load_lora_model  # type: ignore[assignment]
    if job.get("sabotage") == "mix_up":
        from reftune.serving.vllm.slots import Slots

        put, held = Slots.put, []

        def careless(self: Any, number: int, slot: int, adapter: Any) -> None:
            held.append(adapter)
            put(self, number, slot, held[-2] if len(held) % 20 == 0 else adapter)

        Slots.put = careless  # type: ignore[method-assign]
    if job.get("sabotage") == "signature":
        from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

        LoRAModelRunnerMixin.set_active_loras = lambda self, batch: None  # type: ignore[assignment]


def counted(name: str, function: Any) -> Any:
    def call(*args: Any) -> Any:
        COUNTS[name] += 1
        return function(*args)

    return call


def count() -> None:
    from reftune.serving.vllm.slots import Slots
    from reftune.serving.vllm.worker import ReftWorkerAdapters

    Slots.put = counted("activated", Slots.put)  # type: ignore[method-assign]
    ReftWorkerAdapters._load_adapter = counted("loaded", ReftWorkerAdapters._load_adapter)  # type: ignore


def main(folder: Path) -> None:
    job = json.loads((folder / "job.json").read_text())
    before_vllm(job)
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import BeamSearchParams

    after_import(job)
    count()
    options = {"distributed_executor_backend": "uni", "enable_lora": True, "max_model_len": 256} | job["options"]
    llm = LLM(job["model"], dtype="float32", disable_log_stats=False, **options)
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
    config, worker = core.vllm_config, getattr(core.model_executor, "driver_worker", None)
    runner = None if worker is None else worker.worker.model_runner
    answer = {
        "rounds": rounds,
        "preemptions": metrics.get("vllm:num_preemptions"),
        "additional": config.additional_config,
        "mode": str(config.compilation_config.mode),
        "runner": type(runner).__module__,
        **COUNTS,
    }
    (folder / "answer.json").write_text(json.dumps(answer))


def fork_for_each_folder() -> None:
    import vllm.entrypoints.llm  # noqa: F401
    import vllm.lora.worker_manager
    import vllm.model_executor.models.llama
    import vllm.v1.attention.backends.cpu_attn
    import vllm.v1.worker.cpu_worker  # noqa: F401

    import reftune.serving.vllm.worker  # noqa: F401

    for line in sys.stdin:
        seconds, _, folder = line.rstrip("\n").partition(" ")
        child = os.fork()
        if child == 0:
            run_forked(Path(folder), int(seconds))
        _, status = os.waitpid(child, 0)
        print(status, flush=True)


def run_forked(folder: Path, seconds: int) -> None:
    """End this process by the outcome of one engine."""
    signal.alarm(seconds)
    os.chdir(folder)
    printed = os.open("printed", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for descriptor in (1, 2):
        os.dup2(printed, descriptor)
    status = 1
    try:
        main(folder)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def make_room_for_stages() -> None:
    """What vLLM leaves to a warm-up that it never does on a CPU with adapters: where a stage takes what it is sent."""
    import vllm.v1.worker.cpu_worker  # noqa: F401
    from vllm.distributed.parallel_state import get_pp_group
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    stock = CPUModelRunner.load_model

    def load_model(self: Any, *args: Any, **options: Any) -> None:
        stock(self, *args, **options)
        if not get_pp_group().is_first_rank:
            self.intermediate_tensors = self.model.make_empty_intermediate_tensors(
                batch_size=self.max_num_tokens, dtype=self.model_config.dtype, device=self.device
            )

    CPUModelRunner.load_model = load_model  # type: ignore[method-assign]


if os.environ.get("MAKE_ROOM_FOR_STAGES"):  # a worker, which imports the file that started it
    make_room_for_stages()
if __name__ == "__main__":
    main(Path(sys.argv[1])) if len(sys.argv) > 1 else fork_for_each_folder()
