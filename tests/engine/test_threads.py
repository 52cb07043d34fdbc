"""One model used from several threads at once: every call gets the result that it gets alone."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import reftune
from reftune.engine.hooks import Engine
from reftune.engine.transformers_names import enable_checkpointing
from tests.engine.test_planning import edited, greedy, padded
from tests.tiny_models import TINY

LENGTHS = {"equal shapes": [[6, 4], [5, 6], [3, 6], [6, 6]], "unequal shapes": [[6, 4], [3], [9, 2, 5], [1, 7]]}


def logits(model, inputs: dict[str, Tensor], **options) -> Tensor:
    with torch.no_grad():
        return model(**inputs, **options).logits


def wrong_of(calls: list[Callable[[], Tensor]], expected: list[Tensor], times: int, threads: int = 4) -> int:
    """How many of ``times`` calls, run in turn by several threads, do not give what they gave alone."""
    with ThreadPoolExecutor(threads) as pool:
        results = list(pool.map(lambda i: calls[i % len(calls)](), range(times)))
    return sum(not torch.allclose(result, expected[i % len(calls)]) for i, result in enumerate(results))


@pytest.mark.parametrize("shapes", LENGTHS)
def test_a_thousand_forwards_from_several_threads_are_all_right(shapes: str):
    model, _ = edited(positions="f1+l1", component="mlp_output")
    calls = [lambda lengths=lengths: logits(model, padded(lengths)) for lengths in LENGTHS[shapes]]
    assert wrong_of(calls, [call() for call in calls], 1000) == 0


def test_generation_and_forwards_from_several_threads_are_all_right():
    model, _ = edited(positions="l1")
    batches = [padded(lengths) for lengths in LENGTHS["unequal shapes"]]
    calls = [lambda inputs=inputs: greedy(model, inputs, n=4) for inputs in batches]
    calls += [lambda inputs=inputs: logits(model, inputs) for inputs in batches]
    expected = [call() for call in calls]
    assert wrong_of(calls, expected, 96) == 0

    async def served() -> list[Tensor]:
        return await asyncio.gather(*(asyncio.to_thread(call) for call in calls))

    assert all(map(torch.allclose, asyncio.run(served()), expected))


def test_mixed_batches_and_plain_ones_from_several_threads_are_all_right():
    model, first = edited(positions="l1")
    second = reftune.attach(model, r=2, init="paper", positions="all", name="second")
    assert first.edits and second.edits
    inputs, engine = padded([6, 4]), Engine.of(model)
    assert engine is not None

    def mixed(*names: str) -> Tensor:
        with engine.mixed(names):
            return logits(model, inputs)

    rows = [("default", "second"), ("second", "__base__"), ("__base__", "default")]
    calls = [lambda: logits(model, inputs), *(lambda names=names: mixed(*names) for names in rows)]
    expected = [call() for call in calls]
    assert not any(torch.allclose(expected[0], other) for other in expected[1:])
    assert wrong_of(calls, expected, 200) == 0


def test_attaching_in_one_thread_changes_no_forward_under_way_in_another():
    model, _ = edited(positions="l1")
    inputs = padded([6, 4])
    alone = logits(model, inputs)
    stop = threading.Event()

    def attach_and_detach() -> None:
        while not stop.is_set():
            with reftune.attach(model, r=2, layers_to_transform=[0], positions="all", name="other"):
                pass  # identity at its start: whoever sees it gets the same numbers

    thread = threading.Thread(target=attach_and_detach)
    thread.start()
    try:
        assert wrong_of([lambda: logits(model, inputs)], [alone], 200) == 0
    finally:
        stop.set()
        thread.join()


def interrupted(model, inputs: dict[str, Tensor], other: Callable[[], object]) -> Tensor:
    """A forward between whose first and second layer another thread runs ``other``."""
    main = threading.get_ident()

    def in_between(*_: object) -> None:
        if threading.get_ident() == main:
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()

    handle = model.model.layers[0].register_forward_hook(in_between)
    try:
        return logits(model, inputs)
    finally:
        handle.remove()


@pytest.mark.parametrize("kept", ["by thread", "for all threads together"])
def test_a_forward_is_disturbed_by_one_that_begins_within_it_only_if_they_share_a_place(kept: str):
    model, _ = edited(positions="l1")
    mine, other = padded([6, 4]), padded([2, 6], side="right")
    alone, engine = logits(model, mine), Engine.of(model)
    assert engine is not None
    if kept == "for all threads together":  # the control: what the planner keeps by thread, kept as it was before
        engine.planner._here = SimpleNamespace(**vars(engine.planner._here))  # type: ignore[assignment]
    found = interrupted(model, mine, lambda: engine.planner.enter(model, (), other))
    assert torch.equal(found, alone) == (kept == "by thread")


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom"])
@pytest.mark.parametrize("component", ["mlp_output", "attention_input", "block_output"])
def test_a_forward_recomputed_in_another_thread_sees_its_own_plan(name: str, component: str):
    batch = padded([6, 4], side="right")
    batch["labels"] = batch["input_ids"].clone()
    batch["labels"][:, :2] = -100

    def gradients(checkpointed: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model, attachment = edited(name, component=component, positions="l1")
        model.train()
        if checkpointed:
            enable_checkpointing(model, {"use_reentrant": False})
        loss = model(**batch).loss
        logits(model.eval(), padded([3, 6]))  # another forward in between
        model.train()
        thread = threading.Thread(target=loss.backward)  # as autograd's own threads do on a GPU
        thread.start()
        thread.join()
        return [parameter.grad for parameter in attachment.parameters() if parameter.grad is not None]

    plain, again = gradients(False), gradients(True)
    assert len(plain) == len(again) > 0
    assert all(torch.allclose(one, other) for one, other in zip(plain, again, strict=True))


def test_rotations_that_a_step_moved_are_retracted_once_for_all_threads():
    inputs, models = padded([6, 4]), []
    for _ in range(2):
        torch.manual_seed(0)
        model, attachment = edited(positions="all")
        for edit in attachment.edits.values():
            edit.eval().get_parameter("rotation").data.add_(0.3)
        models.append(model)
    expected = logits(models[0], inputs)
    assert wrong_of([lambda: logits(models[1], inputs)], [expected], 100, threads=8) == 0


def test_two_threads_that_attach_to_one_model_share_its_engine():
    for _ in range(20):
        model = TINY["llama"]()
        barrier = threading.Barrier(4)

        def attach(i: int, model=model, barrier=barrier) -> None:
            barrier.wait()
            reftune.attach(model, r=2, name=f"edit{i}")

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(attach, range(4)))
        engine = Engine.of(model)
        assert engine is not None and sorted(engine.adapter_names()) == [f"edit{i}" for i in range(4)]
        assert logits(model, padded([3])).isfinite().all()
