"""Continuous batching of attached edits: `generate_batch` answers what `generate` answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import ContinuousBatchingConfig, GenerationConfig

import reftune
from reftune.engine import packed
from tests.serving.answers import CONFIGS, NEW, PROMPTS, answers_one_by_one, generated, save_all
from tests.tiny_models import CAUSAL

NAMES = ["__base__", *CONFIGS]
GREEDY = GenerationConfig(do_sample=False, max_new_tokens=NEW, eos_token_id=-1)


@pytest.fixture(scope="module")
def expected_and_folders(tmp_path_factory):
    model: Any = CAUSAL["llama"]()
    model.generation_config.eos_token_id = None
    folders = save_all(model, tmp_path_factory.mktemp("adapters"))
    return answers_one_by_one(model, folders, PROMPTS), folders


@pytest.fixture(scope="module")
def expected(expected_and_folders):
    return {(name or "__base__", prompt): answer for (name, prompt), answer in expected_and_folders[0].items()}


@pytest.fixture()
def model(expected_and_folders) -> PeftModel:
    """All eight adapters on one model, the first active."""
    folders: dict[str, Path] = expected_and_folders[1]
    base: Any = CAUSAL["llama"]()
    base.generation_config.eos_token_id = None
    peft = None
    for name, folder in folders.items():
        if peft is None:
            peft = PeftModel.from_pretrained(base, str(folder), adapter_name=name)
        else:
            peft.load_adapter(str(folder), adapter_name=name)
    assert peft is not None
    return peft.eval()


def config(**options: Any) -> ContinuousBatchingConfig:
    return ContinuousBatchingConfig(**{"page_size": 8, "num_blocks": 400, "max_batch_tokens": 512, **options})


def answers(model: Any, jobs: list, generation: GenerationConfig = GREEDY, **options: Any) -> dict:
    results = model.generate_batch(
        [list(prompt) for _, prompt in jobs],
        generation,
        config(**options),
        adapter_names=[name for name, _ in jobs],
    )
    return dict(zip(jobs, [result.generated_tokens for result in results.values()], strict=True))


STATES = {
    "prefixes shared": {},
    "nothing shared": {"allow_block_sharing": False},
    "prompts in chunks": {"max_batch_tokens": 24},
    "a cache too small": {"num_blocks": 25},
    "few requests a batch": {"max_requests_per_batch": 3},
}


@pytest.mark.parametrize("state", STATES)
def test_every_request_is_edited_by_the_adapter_it_names(model, expected, state: str) -> None:
    jobs = list(expected)[::-1]
    assert answers(model, jobs, **STATES[state]) == expected


def test_transformers_own_block_hashes_would_give_wrong_answers(model, expected, monkeypatch) -> None:
    monkeypatch.setattr(packed, "keyed", lambda carried, tokens, size: tokens)
    found = answers(model, list(expected))
    assert sum(found[job] != answer for job, answer in expected.items()) > 5


def test_without_names_the_active_adapters_edit(model, expected) -> None:
    def batch() -> list[list[int]]:
        results = model.generate_batch([list(prompt) for prompt in PROMPTS], GREEDY, config())
        return [result.generated_tokens for result in results.values()]

    for name in ("ends", "answer"):
        model.set_adapter(name)
        assert batch() == [expected[name, prompt] for prompt in PROMPTS]
    with model.disable_adapter():
        assert batch() == [expected["__base__", prompt] for prompt in PROMPTS]
    model.base_model.set_adapter(["answer", "last at all layers"])
    both = [generated(model, prompt) for prompt in PROMPTS]
    assert batch() == both and both != [expected["answer", prompt] for prompt in PROMPTS]


def test_several_answers_to_a_prompt_are_forks_of_one_request(model, expected) -> None:
    generation = GenerationConfig(do_sample=True, top_k=1, max_new_tokens=NEW, num_return_sequences=2, eos_token_id=-1)
    jobs = [job for job in expected if len(job[1]) > 1]
    results = model.generate_batch(
        [list(prompt) for _, prompt in jobs], generation, config(), adapter_names=[name for name, _ in jobs]
    )
    found = [result.generated_tokens for result in results.values()]
    assert found == [expected[job] for job in jobs for _ in range(2)]


def test_a_manager_that_is_kept_sees_what_training_changed(model, expected) -> None:
    """Blocks of keys and values outlive their request; those of other weights must not be used."""
    model.set_adapter("all")
    prompts = [list(prompt) for prompt in PROMPTS[-2:]]
    with model.continuous_batching_context_manager(GREEDY, continuous_batching_config=config()) as manager:

        def ask() -> list[list[int]]:
            for prompt in prompts:
                manager.add_request(prompt)
            found = [manager.get_result(timeout=30) for _ in prompts]
            return [one.generated_tokens for one in sorted(found, key=lambda one: len(one.prompt_ids))]

        assert ask() == ask() == [expected["all", prompt] for prompt in PROMPTS[-2:]]
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "reft_edits.all." in name and name.endswith("bias"):
                    parameter.data.add_(0.7)  # through .data, as some optimisers do: no version counter moves
        after = ask()
        assert manager.batch_processor.scheduler.tokens_shared > 0
    assert after == [generated(model, prompt) for prompt in prompts] != [expected["all", p] for p in PROMPTS[-2:]]


def test_attached_edits_are_batched_too_and_detaching_leaves_transformers_own(expected) -> None:
    base: Any = CAUSAL["llama"]()
    base.generation_config.eos_token_id = None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        attachment = reftune.attach(base, init="paper", positions="f2+l1+generated", r=8)
    prompts = [list(prompt) for prompt in PROMPTS]
    edited = [generated(base, prompt) for prompt in prompts]
    found = base.generate_batch(prompts, GREEDY, config())
    assert [one.generated_tokens for one in found.values()] == edited
    attachment.detach()
    assert "generate_batch" not in vars(base) and "init_continuous_batching" not in vars(base)
    plain = [one.generated_tokens for one in base.generate_batch(prompts, GREEDY, config()).values()]
    assert plain == [expected["__base__", prompt] for prompt in PROMPTS] != edited


def test_generate_and_a_forward_are_as_before_a_batch(model, expected) -> None:
    model.set_adapter("long ends")
    ids = torch.tensor([list(PROMPTS[4])])
    before = model(ids).logits
    answers(model, list(expected)[::5])
    assert torch.equal(model(ids).logits, before)
    assert generated(model, PROMPTS[4]) == expected["long ends", PROMPTS[4]]


def refused(model: Any, words: str, **options: Any) -> None:
    with pytest.raises(reftune.ReftuneError, match=words):
        model.generate_batch([[3, 4, 5], [6, 7]], **{"generation_config": GREEDY, **options})


def test_what_cannot_be_right_is_refused_before_anything_is_generated(model) -> None:
    refused(model, "use_cuda_graph=True", continuous_batching_config=config(use_cuda_graph=True))
    refused(model, "default_compile_level=1", continuous_batching_config=config(default_compile_level=1))
    refused(model, "scheduler_type='prefill_first'", continuous_batching_config=config(scheduler_type="prefill_first"))
    refused(model, r"\['nobody'\] not on this model", adapter_names=["last", "nobody"])
    refused(model, "1 names for 2 prompts", adapter_names=["last"])
    refused(model, "intervention_mask", intervention_mask=torch.ones(2, 3))
    twice = GenerationConfig(do_sample=True, num_return_sequences=2, max_new_tokens=3)
    with pytest.raises(reftune.ReftuneError, match="a prompt of 1 tokens with num_return_sequences=2"):
        model.generate_batch([[3]], twice, config())


def test_a_failing_edit_is_told_and_not_an_empty_answer(model, monkeypatch) -> None:
    monkeypatch.setattr(packed.PackedPlan, "_find", lambda *_: 1 / 0)
    with pytest.raises(RuntimeError, match="answered 0 of 1 requests: division by zero"):
        model.generate_batch([[3, 4, 5]], GREEDY, config())


def test_a_manager_from_before_the_edits_is_refused() -> None:
    base: Any = CAUSAL["llama"]()
    base.generate_batch([[3, 4, 5]], GREEDY, config(), persistent_manager=True)
    with reftune.attach(base), pytest.raises(reftune.ReftuneError, match="destroy_cached_continuous_batching_manager"):
        base.generate_batch([[3, 4, 5]], GREEDY, config())
    base.destroy_cached_continuous_batching_manager()


def test_a_version_without_scheduler_types_is_one_clear_error(model, monkeypatch) -> None:
    import transformers.generation.continuous_batching.scheduler as theirs

    packed._register_scheduler.cache_clear()
    monkeypatch.delattr(theirs, "SCHEDULER_MAPPING")
    refused(model, "does not offer the scheduler types")
    monkeypatch.undo()
    packed._register_scheduler()


def test_the_seam_in_transformers_is_where_it_was() -> None:
    """Fails at an upgrade of transformers, not at a user's."""
    import inspect

    from transformers.generation.continuous_batching import ContinuousBatchingManager
    from transformers.generation.continuous_batching.cache import PagedAttentionCache
    from transformers.generation.continuous_batching.cache_allocators.cache_allocator import CacheAllocator
    from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessorList
    from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING, FIFOScheduler

    def parameters(function: Any) -> list[str]:
        return list(inspect.signature(function).parameters)[1:]

    assert "fifo" in SCHEDULER_MAPPING
    assert parameters(FIFOScheduler.__init__) == ["cache", "safety_margin", "max_requests_per_batch"]
    assert parameters(FIFOScheduler.schedule_batch) == ["token_budget", "cache_budget"]
    assert parameters(PagedAttentionCache.search_prefix_match) == ["request_id", "prompt_ids"]
    assert parameters(CacheAllocator.mark_complete_blocks) == ["request_id", "token_ids", "new_new_blocks"]
    assert "logit_processor_kwargs" in parameters(ContinuousBatchingManager.add_request)
    assert "supported_keys" in inspect.getsource(ContinuousBatchingLogitsProcessorList)
