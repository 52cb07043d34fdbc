"""The embedded engine: answers equal those of `generate` one by one, however the work is scheduled."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

import reftune
from reftune.adapter.checkpoint import WEIGHTS_FILE
from reftune.engine import packed
from reftune.serving.bank import Bank
from reftune.serving.engine import EmbeddedEngine
from reftune.serving.requests import Sampling, TokenEngine
from tests.serving.adapters import save_adapter
from tests.serving.answers import CONFIGS, NEW, PROMPTS, answers_one_by_one, ask, ask_all, generated, save_all, text
from tests.tiny_models import CAUSAL, VOCAB


@pytest.fixture(scope="module")
def llama() -> Any:
    model = CAUSAL["llama"]()
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="module")
def folders(llama, tmp_path_factory) -> dict[str, Path]:
    return save_all(llama, tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def expected(llama, folders):
    return answers_one_by_one(llama, folders, PROMPTS)


@pytest.fixture()
def engine(llama) -> Iterator[EmbeddedEngine]:
    with EmbeddedEngine(llama, None, page_tokens=8) as engine:
        yield engine


def wrong(found: dict, expected: dict) -> list:
    return [(name, len(prompt)) for (name, prompt), answer in found.items() if answer != expected[name, prompt]]


def test_the_edits_change_the_answers(expected) -> None:
    changed = [job for job, answer in expected.items() if job[0] and answer != expected[None, job[1]]]
    assert len(changed) > 0.8 * len(CONFIGS) * len(PROMPTS)


STATES = {
    "prefixes shared": ({}, lambda s: s["prefix_tokens"] > 500),
    "nothing shared": ({"share_prefixes": False}, lambda s: s["prefix_tokens"] == 0),
    "prompts in chunks": ({"batch_tokens": 24}, lambda s: s["prefix_tokens"] > 500),
    "chunks without sharing": ({"batch_tokens": 20, "share_prefixes": False}, lambda s: s["prefix_tokens"] == 0),
    "a cache too small": ({"cache_tokens": 200}, lambda s: s["preemptions"] > 50),
    "few requests a batch": ({"requests": 3}, lambda s: s["prefix_tokens"] > 500),
    "a bank too small": ({"bank": 2}, lambda s: s["bank_evictions"] > 0),
}


@pytest.mark.parametrize("state", STATES)
def test_every_answer_of_every_adapter_is_that_of_generate(llama, folders, expected, state: str) -> None:
    """70 requests at once, of nine adapters and the base; then once more, with what is cached."""
    options, happened = STATES[state]
    options = {"page_tokens": 8, "cache_tokens": 4096, **options}
    bank = Bank(max_adapters=options.pop("bank", None))
    with EmbeddedEngine(llama, None, bank, **options) as engine:
        for _ in range(2):
            assert wrong(ask_all(engine, folders, list(expected)), expected) == []
        assert happened(engine.statistics()), engine.statistics()


def test_hashing_blocks_by_their_tokens_alone_gives_wrong_answers(llama, folders, expected, monkeypatch) -> None:
    """The control: what transformers does without edits, and what the keys are for."""
    monkeypatch.setattr(packed, "keyed", lambda carried, tokens, size: tokens)
    with EmbeddedEngine(llama, None, page_tokens=8) as engine:
        for _ in range(2):
            found = ask_all(engine, folders, list(expected))
        assert len(wrong(found, expected)) > 5


def test_a_version_that_marks_blocks_in_another_way_shares_nothing(llama, folders, expected, monkeypatch) -> None:
    from transformers.generation.continuous_batching.cache_allocators.cache_allocator import CacheAllocator

    monkeypatch.setattr(CacheAllocator, "mark_complete_blocks", None)
    jobs = list(expected)[::3]
    with EmbeddedEngine(llama, None, page_tokens=8) as engine:
        for _ in range(2):
            assert wrong(ask_all(engine, folders, jobs), expected) == []
        assert engine.statistics()["prefix_tokens"] == 0


def test_eager_attention_is_right_too(folders, expected) -> None:
    model = CAUSAL["llama"]()
    model.generation_config.eos_token_id = None
    model.set_attn_implementation("eager")
    with EmbeddedEngine(model, None, page_tokens=8) as engine:
        assert wrong(ask_all(engine, folders, list(expected)[::2]), expected) == []


@pytest.mark.parametrize("name", ["mistral", "gemma3", "qwen3_moe", "gpt2"])
def test_other_architectures_are_right_whole_and_in_chunks(name: str, tmp_path: Path) -> None:
    model: Any = CAUSAL[name]()
    model.generation_config.eos_token_id = None
    place = "mlp_output" if name == "gpt2" else "attention_output"
    configs = {
        "ends": CONFIGS["ends"],
        "answer": {"positions": "l1+generated", "component": place},
    }
    folders = save_all(model, tmp_path, configs)
    prompts = PROMPTS[1::2]
    expected = answers_one_by_one(model, folders, prompts)
    for batch_tokens in (512, 12):
        with EmbeddedEngine(model, None, page_tokens=8, batch_tokens=batch_tokens) as engine:
            assert wrong(ask_all(engine, folders, list(expected)), expected) == []


def test_several_adapters_edit_one_after_the_other_each_with_its_strength(engine, llama, folders) -> None:
    names, strengths = ["ends", "answer"], [0.5, -0.75]
    peft = PeftModel.from_pretrained(llama, str(folders[names[0]]), adapter_name="a").eval()
    peft.load_adapter(str(folders[names[1]]), adapter_name="b")
    peft.base_model.set_adapter(["a", "b"])
    for name, strength in zip("ab", strengths, strict=True):
        peft.base_model.set_scale(name, strength)
    expected = [generated(peft, prompt) for prompt in PROMPTS]
    peft.unload()
    adapters = [(folders[name], strength) for name, strength in zip(names, strengths, strict=True)]

    async def everything() -> list[list[int]]:
        found = await asyncio.gather(*(ask(engine, prompt, adapters) for prompt in PROMPTS))
        assert found != await asyncio.gather(*(ask(engine, prompt, adapters[:1]) for prompt in PROMPTS))
        return found

    assert asyncio.run(everything()) == expected


def test_a_folder_that_changes_is_read_again_and_no_old_keys_and_values_are_used(llama, folders, tmp_path) -> None:
    names = ["ends", "last at all layers", "prompt", "all"]
    expected = answers_one_by_one(llama, {name: folders[name] for name in names}, PROMPTS[-2:])
    with EmbeddedEngine(llama, None, page_tokens=8) as engine:
        for name in [*names, *names]:
            shutil.copytree(folders[name], tmp_path / "poet", dirs_exist_ok=True)
            for prompt in PROMPTS[-2:]:
                assert asyncio.run(ask(engine, prompt, [(tmp_path / "poet", 1.0)])) == expected[name, prompt]
        assert engine.statistics()["prefix_tokens"] > 0


# One answer


def test_it_is_what_the_http_interface_asks_for(engine) -> None:
    assert isinstance(engine, TokenEngine)
    assert engine.context == 64 and engine.vocabulary == VOCAB
    assert engine.statistics_help().keys() == engine.statistics().keys()


def test_an_answer_ends_at_the_end_token_or_its_length(llama, folders) -> None:
    plain = generated(llama, PROMPTS[3])
    model = CAUSAL["llama"]()
    model.generation_config.eos_token_id = [96, plain[4]]
    first = plain.index(plain[4]) + 1

    async def both() -> list:
        found = []
        for new in (first + 3, first - 1):
            async with await engine.submit(PROMPTS[3], max_new_tokens=new) as stream:
                found.append([(token.id, finish) async for tokens, finish in stream for token in tokens])
        return found

    with EmbeddedEngine(model, None) as engine:
        ended, cut = asyncio.run(both())
    assert ended == [(token, None) for token in plain[: first - 1]] + [(plain[4], "stop")]
    assert cut[-1] == (plain[first - 2], "length") and len(cut) == first - 1


def test_each_answer_has_its_own_generator_and_settings(engine, folders) -> None:
    hot = Sampling(temperature=2.0, seed=7)
    adapters = [(folders["last"], 1.0)]

    async def alone_and_together():
        alone = await ask(engine, PROMPTS[4], adapters, hot)
        others = [ask(engine, p, [], Sampling(temperature=1.5, seed=s)) for s, p in enumerate(PROMPTS)]
        greedy = ask(engine, PROMPTS[4], adapters, Sampling())
        other_seed = ask(engine, PROMPTS[4], adapters, Sampling(temperature=2.0, seed=8))
        unseeded = [ask(engine, PROMPTS[4], adapters, Sampling(temperature=2.0)) for _ in range(2)]
        asked = (ask(engine, PROMPTS[4], adapters, hot), greedy, other_seed, *unseeded)
        return alone, (await asyncio.gather(*asked, *others))[:5]

    alone, (again, greedy, other, *unseeded) = asyncio.run(alone_and_together())
    assert again == alone and other != alone and greedy not in (alone, other)
    assert unseeded[0] != unseeded[1]


def test_sampling_survives_preemption(llama, folders) -> None:
    async def everything(engine):
        return await asyncio.gather(
            *(
                ask(engine, p, [(folders["answer"], 1.0)], Sampling(temperature=1.0, seed=i))
                for i, p in enumerate(PROMPTS * 4)
            )
        )

    with EmbeddedEngine(llama, None, page_tokens=8) as engine:
        roomy = asyncio.run(everything(engine))
    with EmbeddedEngine(llama, None, page_tokens=8, cache_tokens=200) as engine:
        assert asyncio.run(everything(engine)) == roomy
        assert engine.statistics()["preemptions"] > 0


def test_logprobs_are_those_of_the_models_own_forward(engine, llama, folders) -> None:
    prompt, sampling = PROMPTS[4], Sampling(temperature=0.7, top_k=5, seed=1, logprobs=3)

    async def tokens():
        async with await engine.submit(
            prompt, adapters=[(folders["answer"], 1.0)], max_new_tokens=6, sampling=sampling
        ) as stream:
            return [token async for found, _ in stream for token in found]

    found = asyncio.run(tokens())
    peft = PeftModel.from_pretrained(llama, str(folders["answer"])).eval()
    ids = torch.tensor([[*prompt, *(token.id for token in found)]])
    with torch.no_grad():
        logits = peft(ids, attention_mask=torch.ones_like(ids), prompt_lengths=[len(prompt)]).logits
    peft.unload()
    for place, token in enumerate(found, len(prompt) - 1):
        logprobs = logits[0, place].log_softmax(-1)
        assert token.logprob == pytest.approx(float(logprobs[token.id]), abs=1e-4)
        top = logprobs.topk(3)
        assert [one for one, _ in token.top] == top.indices.tolist()
        assert [value for _, value in token.top] == pytest.approx(top.values.tolist(), abs=1e-4)


def test_leaving_an_answer_cancels_it_and_gives_its_adapter_back(engine, folders) -> None:
    async def leave():
        for name in ("last", "all", "bent"):
            async with await engine.submit(PROMPTS[4], adapters=[(folders[name], 1.0)], max_new_tokens=40) as stream:
                async for _ in stream:
                    break
        async with await engine.submit(PROMPTS[4], adapters=[(folders["ends"], 1.0)], max_new_tokens=40):
            pass
        return await ask(engine, PROMPTS[4])

    assert len(asyncio.run(leave())) == NEW
    scheduler = engine._manager.batch_processor.scheduler
    for _ in range(100):
        if not scheduler.has_pending_requests():
            break
        asyncio.run(asyncio.sleep(0.05))
    assert not scheduler.active_requests and not scheduler.waiting_requests
    assert all(found.requests == 0 for found in engine.bank._loaded.values())
    assert not engine._manager.output_router.result_handlers


def test_closing_writes_what_has_begun_and_leaves_the_base_model(llama, folders) -> None:
    before = {name: len(module._forward_hooks) for name, module in llama.named_modules()}
    engine = EmbeddedEngine(llama, None)

    async def close_early():
        engine.start()
        async with await engine.submit(PROMPTS[4], adapters=[(folders["all"], 1.0)], max_new_tokens=30) as stream:
            closing = asyncio.get_running_loop().run_in_executor(None, engine.close)
            found = [token.id async for tokens, _ in stream for token in tokens]
            await closing
        return found

    assert len(asyncio.run(close_early())) == 30
    assert not engine.alive
    assert {name: len(module._forward_hooks) for name, module in llama.named_modules()} == before
    with pytest.raises(reftune.ReftuneError, match="does not run"):
        asyncio.run(ask(engine, PROMPTS[0]))


def test_a_request_that_cannot_be_served_is_refused_and_the_others_go_on(engine, folders, tmp_path) -> None:
    damaged = Path(shutil.copytree(folders["last"], tmp_path / "damaged"))
    (damaged / WEIGHTS_FILE).write_bytes(b"no")
    other = CAUSAL["gpt2"]()
    foreign = save_adapter(other, tmp_path / "foreign")
    short = save_adapter(CAUSAL["llama"](), tmp_path / "short", layers_to_transform=[2])
    cases: list[tuple[dict[str, Any], str]] = [
        ({"adapters": [(damaged, 1.0)]}, "not an intact"),
        ({"adapters": [(tmp_path / "none", 1.0)]}, "is not a folder"),
        ({"adapters": [(folders["last"], 1.0), (foreign, 1.0)]}, "another base model"),
        ({"prompt": []}, "at least one"),
        ({"prompt": [3, VOCAB]}, "0 to 96"),
        ({"prompt": [-1]}, "0 to 96"),
        ({"max_new_tokens": 0}, "at least 1"),
        ({"max_new_tokens": 60}, "at most 64 tokens together"),
        ({"sampling": Sampling(temperature=-1.0)}, "temperature=-1"),
        ({"sampling": Sampling(top_p=float("nan"))}, "top_p=nan"),
        ({"sampling": Sampling(logit_bias={VOCAB: 1.0})}, "logit_bias"),
    ]

    async def everything():
        good = asyncio.gather(*(ask(engine, prompt, [(short, 1.0)]) for prompt in PROMPTS))
        for changed, words in cases:
            arguments = {"prompt": text(10), "max_new_tokens": 5, **changed}
            with pytest.raises(reftune.ReftuneError, match=words):
                await engine.submit(arguments.pop("prompt"), **arguments)
        return await good

    assert all(len(answer) == NEW for answer in asyncio.run(everything()))
    assert all(found.requests == 0 for found in engine.bank._loaded.values())
    with pytest.raises(reftune.ReftuneError, match="another base model"):
        engine.check(foreign)


def test_the_edited_tokens_of_a_prompt_can_be_asked_for(engine, folders) -> None:
    assert engine.edited([folders["last"]], 9) == [8]
    assert engine.edited([folders["ends"], folders["answer"]], 9) == [0, 1, 6, 7, 8]
    assert engine.edited([folders["all"]], 3) == [0, 1, 2] and engine.edited([], 3) == []


def test_a_forward_that_fails_fails_its_answers_and_ends_the_engine(llama, folders, monkeypatch) -> None:
    with EmbeddedEngine(llama, None) as engine:
        monkeypatch.setattr(engine.bank, "edit", lambda *_: 1 / 0)
        with pytest.raises(RuntimeError, match="could not be written: division by zero"):
            asyncio.run(ask(engine, PROMPTS[4], [(folders["last"], 1.0)]))
        engine._manager._generation_thread.join(10)
        assert not engine.alive


def test_a_model_with_edits_of_its_own_is_refused(llama) -> None:
    with reftune.attach(llama), pytest.raises(reftune.ReftuneError, match="carries edits already"):
        EmbeddedEngine(llama, None)
