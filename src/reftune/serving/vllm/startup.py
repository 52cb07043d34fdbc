"""EngineCore at its start: what is refused, and the self-test after which it is known that an edit moves a token."""
# pyright: reportMissingImports=false

from __future__ import annotations

import time
from typing import Any

from reftune.errors import ReftuneError
from reftune.serving.vllm.requested import SELF_TEST

_IDS = (2**31 - 3, 2**31 - 2)


REFUSED = {
    "speculative_config": "a draft is made from hidden states that have not seen the edits: not tested",
    "kv_transfer_config": "a connector may name blocks by tokens alone, or by the adapter's name, and mix adapters up",
    "enable_dbo": "a batch in two halves has rows of other numbers",
    "ubatch_size": "a batch in parts has rows of other numbers",
    "prefill_context_parallel_size": "a rank sees a part of a prompt's rows",
    "runner": "only generation is served",
    "is_encoder_decoder": "only decoders are served",
    "is_diffusion": "only models that write one token after the other are served",
}
"""Options of vLLM in which answers could be wrong without any sign, and why."""


def refuse(vllm_config: Any) -> None:
    """Refuse a configuration in which answers could be wrong without any sign.

    Raises:
        ReftuneError: names the option.
    """
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    given = {
        "speculative_config": vllm_config.speculative_config,
        "kv_transfer_config": vllm_config.kv_transfer_config,
        "enable_dbo": getattr(parallel, "enable_dbo", False),
        "ubatch_size": getattr(parallel, "ubatch_size", 0) > 1,
        "prefill_context_parallel_size": getattr(parallel, "prefill_context_parallel_size", 1) > 1,
        "runner": model.runner_type != "generate",
        "is_encoder_decoder": model.is_encoder_decoder,
        "is_diffusion": getattr(model, "is_diffusion", False),
    }
    for option, reason in REFUSED.items():
        if given[option]:
            raise ReftuneError(
                f"vLLM with ReFT adapters and {option}: {reason}. Start it without, or without --enable-lora."
            )


def self_test(core: Any) -> None:
    """Generate a token with each of two adapters that push it to opposite sides; the tokens must differ.

    Raises:
        ReftuneError: they do not: in this vLLM, or on this model, an edit does nothing; or a step fails.
    """
    if core.vllm_config.parallel_config.data_parallel_size > 1:
        return  # the ranks of data parallelism step together, and start one after another
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine import EngineCoreRequest

    names = (f"{SELF_TEST}+", f"{SELF_TEST}-")
    for name, number in zip(names, _IDS, strict=True):
        core.reftune_requested.admit_self_test(number, name)
        request = EngineCoreRequest(
            request_id=name, prompt_token_ids=[1, 1, 1], mm_features=None,
            sampling_params=SamplingParams(temperature=0.0, max_tokens=1, detokenize=False), pooling_params=None,
            arrival_time=time.time(), lora_request=LoRARequest(name, number, name), cache_salt=None,
            data_parallel_rank=None,
        )  # fmt: skip
        core.add_request(*core.preprocess_add_request(request))
    tokens: dict[str, list[int]] = {}
    try:
        for _ in range(100):
            outputs, executed = core.step_fn()
            core.post_step(executed)
            for group in (outputs or {}).values():
                for output in group.outputs:
                    tokens.setdefault(output.request_id, []).extend(output.new_token_ids)
            if not core.scheduler.has_unfinished_requests() and len(tokens) == len(names):
                break
    except Exception as error:
        raise ReftuneError(f"self-test: this model and configuration cannot make a step: {error!r}.") from error
    for number in _IDS:
        core.remove_lora(number)
    if len(tokens) < len(names) or tokens[names[0]] == tokens[names[1]]:
        raise ReftuneError(
            f"self-test: two opposite edits of the last layer gave the tokens {tokens}: in this vLLM, or on this "
            "model, an edit does nothing, so the server does not start. Use reftune serve --engine embedded."
        )
