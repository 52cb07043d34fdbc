"""Every name of vLLM that the plug-in replaces, with its signature, and what happens where one has changed."""
# pyright: reportMissingImports=false

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import inspect
import multiprocessing
import os
import threading
from typing import Any

from reftune.errors import ReftuneError
from reftune.serving.vllm.requested import FOLDERS, Requested, is_reft

TESTED = ("0.32", "0.33")
"""Versions of vLLM whose signatures were compared; an untested one is used as long as they are the same."""

EXPECTED = {
    "vllm.v1.engine.core:EngineCore.__init__": ["self", "vllm_config"],
    "vllm.v1.engine.core:EngineCore._initialize_kv_caches": ["self", "vllm_config"],
    "vllm.v1.engine.core:EngineCoreProc.run_engine_core": ["args"],
    "vllm.v1.engine.core:EngineCore.preprocess_add_request": ["self", "request"],
    "vllm.v1.engine.input_processor:InputProcessor._validate_lora": ["self", "lora_request"],
    "vllm.v1.engine.core:EngineCore.add_request": ["self", "request", "request_wave"],
    "vllm.v1.engine.core:EngineCore.step": ["self"],
    "vllm.v1.engine.core:EngineCore.post_step": ["self", "model_executed"],
    "vllm.v1.engine.core:EngineCore.remove_lora": ["self", "lora_id"],
    "vllm.v1.engine.async_llm:AsyncLLM.shutdown": ["self", "timeout"],
    "vllm.v1.engine.output_processor:OutputProcessor.abort_requests": ["self", "request_ids", "internal"],
    "vllm.v1.core.kv_cache_utils:generate_block_hash_extra_keys": [
        "request", "start_token_idx", "end_token_idx", "start_mm_idx",
    ],
    "vllm.v1.worker.lora_model_runner_mixin:LoRAModelRunnerMixin.load_lora_model": [
        "self", "model", "vllm_config", "device",
    ],
    "vllm.v1.worker.lora_model_runner_mixin:LoRAModelRunnerMixin.set_active_loras": [
        "self", "input_batch", "num_scheduled_tokens",
    ],
    "vllm.v1.worker.gpu.lora_utils:LoraState.make_lora_inputs": [
        "self", "req_ids", "idx_mapping", "num_scheduled_tokens",
    ],
    "vllm.lora.worker_manager:LRUCacheWorkerLoRAManager.create_lora_manager": ["self", "model", "vllm_config"],
    "vllm.lora.worker_manager:LRUCacheWorkerLoRAManager.add_adapter": ["self", "lora_request"],
    "vllm.lora.worker_manager:LRUCacheWorkerLoRAManager._apply_adapters": ["self", "lora_requests"],
    "vllm.lora.worker_manager:LRUCacheWorkerLoRAManager._load_adapter": ["self", "lora_request"],
    "vllm.lora.worker_manager:LRUCacheWorkerLoRAManager.set_active_adapters": ["self", "requests", "mapping"],
    "vllm.lora.model_manager:LRUCacheLoRAModelManager._add_adapter": ["self", "lora"],
    "vllm.lora.model_manager:LRUCacheLoRAModelManager._deactivate_adapter": ["self", "lora_id"],
    "vllm.lora.model_manager:LRUCacheLoRAModelManager.activate_adapter": ["self", "lora_id"],
    "vllm.lora.model_manager:LRUCacheLoRAModelManager.set_adapter_mapping": ["self", "mapping"],
    "vllm.lora.lora_model:LoRAModel.__init__": ["self", "lora_model_id", "rank", "loras"],
    "vllm.lora.ops.torch_ops.lora_ops:bgmv_shrink": [
        "inputs", "lora_b_weights", "output_tensor", "lora_indices_tensor",
    ],
    "vllm.lora.resolver:LoRAResolver.resolve_lora": ["self", "base_model_name", "lora_name"],
    "vllm.entrypoints.generate.beam_search.offline:BeamSearchOfflineMixin.beam_search": [
        "self", "prompts", "params", "lora_request",
    ],
    "vllm.entrypoints.generate.beam_search.online:BeamSearchOnlineMixin.beam_search": [
        "self", "prompt", "request_id", "params", "lora_request",
    ],
}  # fmt: skip


def differences() -> list[str]:
    """Where this vLLM is not the one that the plug-in was written for: nothing, or one sentence each."""
    found = []
    for place, expected in EXPECTED.items():
        try:
            function = _at(place)
        except (ImportError, AttributeError) as error:
            found.append(f"{place} is not there ({error})")
            continue
        names = list(inspect.signature(function).parameters)
        if names[: len(expected)] != expected:
            found.append(f"{place} takes ({', '.join(names)}), not ({', '.join(expected)}, ...)")
    return found


def install() -> None:
    """Replace what has to be replaced in this process; once.

    Raises:
        ReftuneError: vLLM has changed, and the server was started to serve ReFT adapters.
    """
    from vllm.logger import init_logger
    from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

    if hasattr(LoRAModelRunnerMixin, "_reftune"):
        return
    if changed := differences():
        message = (
            f"vLLM {importlib.metadata.version('vllm')} is not one that reftune can serve adapters in (it can in "
            f"{', '.join(TESTED)}): "
            f"{'; '.join(changed)}. Install one of those."
        )
        if os.environ.get(FOLDERS):
            raise ReftuneError(message)
        init_logger(__name__).error(
            "%s ReFT folders cannot be loaded.", message
        )  # vLLM itself may be wanted all the same
        return
    LoRAModelRunnerMixin._reftune = True
    _hook_workers(LoRAModelRunnerMixin)
    _hook_engine_core()
    _check_requests()
    _refuse_beam_search()
    if os.environ.get(FOLDERS):
        from reftune.serving.vllm.server import add_resolver

        add_resolver()


def _hook_workers(mixin: Any) -> None:
    stock_load, stock_active = mixin.load_lora_model, mixin.set_active_loras

    @functools.wraps(stock_load)
    def load_lora_model(self: Any, model: Any, vllm_config: Any, device: Any) -> Any:
        from vllm.v1.worker import lora_model_runner_mixin as module

        from reftune.serving.vllm.worker import ReftWorkerAdapters, step_of_v2

        module.LRUCacheWorkerLoRAManager = ReftWorkerAdapters
        wrapped = stock_load(self, model, vllm_config, device)
        if not isinstance(self.lora_manager, ReftWorkerAdapters):
            raise ReftuneError("vLLM made its own cache of adapters: ReFT adapters would be ignored.")
        if hasattr(self, "lora_state"):  # the second model runner
            stock_inputs = self.lora_state.make_lora_inputs

            def make_lora_inputs(req_ids: Any, idx_mapping: Any, num_scheduled_tokens: Any) -> Any:
                self.lora_manager.next_step = step_of_v2(self, idx_mapping, num_scheduled_tokens)
                return stock_inputs(req_ids, idx_mapping, num_scheduled_tokens)

            self.lora_state.make_lora_inputs = make_lora_inputs
        return wrapped

    @functools.wraps(stock_active)
    def set_active_loras(self: Any, input_batch: Any, num_scheduled_tokens: Any, *rest: Any, **options: Any) -> Any:
        from reftune.serving.vllm.worker import step_of_v1

        self.lora_manager.next_step = step_of_v1(input_batch, num_scheduled_tokens)
        return stock_active(self, input_batch, num_scheduled_tokens, *rest, **options)

    mixin.load_lora_model, mixin.set_active_loras = load_lora_model, set_active_loras


def run_engine_core(*args: Any, **options: Any) -> None:
    """What a process of EngineCore runs in place of vLLM's own: the plug-in first, which vLLM loads too late there.

    It ends with the process that started it, also where that was killed: vLLM's own would stay, with its memory. A
    terminal's Ctrl-C is for the server alone, which lets answers end first: workers that get it too go at once.
    """
    install()
    os.setpgrp()
    if (parent := multiprocessing.parent_process()) is not None:
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    _stock_run_engine_core(*args, **options)


_stock_run_engine_core: Any = None


def _hook_engine_core() -> None:
    global _stock_run_engine_core
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.engine.core import EngineCore, EngineCoreProc

    from reftune.serving.vllm.block_keys import keyed
    from reftune.serving.vllm.startup import refuse, self_test

    stock_init, stock_keys = EngineCore.__init__, kv_cache_utils.generate_block_hash_extra_keys
    stock_caches, stock_add = EngineCore._initialize_kv_caches, EngineCore.preprocess_add_request

    @functools.wraps(stock_init)
    def init(self: Any, vllm_config: Any, *rest: Any, **options: Any) -> None:
        if vllm_config.lora_config is None:
            return stock_init(self, vllm_config, *rest, **options)
        refuse(vllm_config)
        self.reftune_requested = Requested.of(vllm_config)
        kv_cache_utils.generate_block_hash_extra_keys = keyed(stock_keys, self.reftune_requested.known)
        stock_init(self, vllm_config, *rest, **options)
        self_test(self)

    @functools.wraps(stock_caches)
    def _initialize_kv_caches(self: Any, vllm_config: Any) -> Any:
        if vllm_config.lora_config is not None and not hasattr(self, "reftune_requested"):
            raise ReftuneError(
                "vLLM loaded the plug-in for ReFT adapters into an EngineCore that had begun to start: its prefix "
                "cache would mix their answers up. Start it in a process of its own (no Ray), or without --enable-lora."
            )
        return stock_caches(self, vllm_config)

    @functools.wraps(stock_add)
    def preprocess_add_request(self: Any, request: Any) -> Any:
        # Read here, an adapter that is gone meanwhile ends its request; at a block's key it would end the engine.
        if request.lora_request is not None and hasattr(self, "reftune_requested"):
            self.reftune_requested.known(request.lora_request)
        return stock_add(self, request)

    EngineCore.__init__, EngineCore._initialize_kv_caches = init, _initialize_kv_caches
    EngineCore.preprocess_add_request = preprocess_add_request
    _stock_run_engine_core = EngineCoreProc.run_engine_core
    EngineCoreProc.run_engine_core = staticmethod(run_engine_core)


def _check_requests() -> None:
    """Refuse an adapter where a request comes in: only that request fails, nothing of it is under way yet."""
    from vllm.v1.engine.input_processor import InputProcessor

    stock = InputProcessor._validate_lora

    @functools.wraps(stock)
    def _validate_lora(self: Any, lora_request: Any) -> None:
        stock(self, lora_request)
        if lora_request is not None:
            if not hasattr(self, "_reftune_requested"):
                self._reftune_requested = Requested.of(self.vllm_config)
            self._reftune_requested.known(lora_request)

    InputProcessor._validate_lora = _validate_lora


def _refuse_beam_search() -> None:
    for place in EXPECTED:
        if not place.endswith(".beam_search"):
            continue
        owner = _at(place.rpartition(".")[0])
        stock = owner.beam_search

        def beam_search(self: Any, *args: Any, _stock: Any = stock, **options: Any) -> Any:
            bound = inspect.signature(_stock).bind(self, *args, **options).arguments.get("lora_request")
            for request in bound if isinstance(bound, list) else [bound]:
                if request is not None and is_reft(request.lora_path):
                    raise ReftuneError(
                        f"adapter {request.lora_name!r}: vLLM's beam search sends the answer so far as a longer "
                        "prompt, whose last tokens would be edited as prompt. Sample without beams, or use "
                        "model.generate(num_beams=...)."
                    )
            return _stock(self, *args, **options)

        owner.beam_search = functools.wraps(stock)(beam_search)


def _at(place: str) -> Any:
    module, _, path = place.partition(":")
    return functools.reduce(getattr, path.split("."), importlib.import_module(module))
