"""One model used from several threads, some of them under interventions: every call gets what it gets alone."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations

import pytest
import torch
from torch import Tensor

from reftune.causal.interchange import Run, add, intervene, put, read, run, swap, zero
from reftune.causal.locations import Location
from reftune.causal.reuse import Recording
from reftune.causal.session import Stop
from reftune.causal.sweep import sweep
from reftune.engine.hooks import hook_before
from reftune.engine.sites import find_stacks
from tests.tiny_models import CAUSAL

AT = Location("block_output", 1, "l1")
INPUT = Location("block_input", 2, "f2")
BASE = {"input_ids": torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, 6, 5]])}
OTHER = {"input_ids": torch.tensor([[15, 16, 17], [25, 26, 27]])}


@pytest.fixture
def model():
    with torch.no_grad():
        yield CAUSAL["llama"]().eval()


def wrong_of(calls: list[Callable[[], Tensor]], times: int = 200, threads: int = 4) -> int:
    """How many of ``times`` calls, run in turn by several threads, do not give what they gave alone."""
    expected = [call() for call in calls]
    assert not any(torch.equal(one, other) for one, other in combinations(expected, 2))

    def right(index: int) -> bool:
        with torch.no_grad():
            return torch.equal(calls[index % len(calls)](), expected[index % len(calls)])

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(right, range(times))).count(False)


def meanwhile(call: Callable[[], Tensor]) -> Tensor:
    """What a call gives in another thread."""

    def job() -> Tensor:
        with torch.no_grad():
            return call()

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(job).result(timeout=20)


def test_swaps_reads_and_plain_forwards_from_several_threads_are_all_right(model):
    def nested() -> Tensor:
        with intervene(model, zero(AT)), intervene(model, swap(INPUT, Run(OTHER, (zero(INPUT.at("f1")),)))):
            return model(**BASE).logits

    assert 0 == wrong_of(
        [
            lambda: model(**BASE).logits,
            lambda: run(model, Run(BASE, (swap(AT, OTHER),))).logits,
            lambda: model.forward(**OTHER).logits,
            lambda: read(model, BASE, AT)[0],
            nested,
        ]
    )
    assert not {"forward", "generate"} & model.__dict__.keys()
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


def test_an_open_session_is_of_its_own_thread_alone(model):
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    calls = [
        lambda: model(**BASE).logits,
        lambda: model.forward(**BASE).logits,
        lambda: model.generate(**BASE, **options, output_scores=True, return_dict_in_generate=True).scores[0],
    ]
    alone = [call() for call in calls]
    with intervene(model, zero(AT), add(INPUT, torch.ones(32))):
        edited = [call() for call in calls]
        for call, want, changed in zip(calls, alone, edited, strict=True):
            assert torch.equal(meanwhile(call), want)
            assert torch.equal(call(), changed) and not torch.allclose(changed, want)


def test_a_second_thread_waits_for_its_turn(model):
    want = run(model, Run(BASE, (put(AT, torch.ones(2, 32)),))).logits
    with ThreadPoolExecutor(1) as pool:
        with intervene(model, zero(AT)) as outer, intervene(model, add(AT, torch.ones(32))):
            model(**BASE)
            before = outer.collected()
            later = pool.submit(lambda: run(model, Run(BASE, (put(AT, torch.ones(2, 32)),))).logits)
            with pytest.raises(TimeoutError):
                later.result(timeout=0.1)
            assert torch.equal(outer.collected(), before)
        torch.testing.assert_close(later.result(timeout=20), want)


def test_layers_that_are_not_computed_again_are_so_in_one_thread(model):
    want, seen = model(**OTHER).logits, []
    stack = find_stacks(model)[0]

    def interrupt(*_: object) -> None:
        if threading.current_thread() is threading.main_thread():
            seen.append(meanwhile(lambda: model(**OTHER).logits))

    handle = model.model.layers[0].register_forward_hook(interrupt)
    recording = Recording(model, Run(BASE), stack, [1])
    base = model(**BASE).logits
    with recording.resume(2, lambda tensor: tensor):
        assert torch.equal(model(input_ids=BASE["input_ids"] + 1).logits, base)
    handle.remove()
    assert len(seen) == 3 and all(torch.equal(one, want) for one in seen)
    assert not any("forward" in block.__dict__ for block in model.model.layers)


def test_sweeps_from_several_threads_are_all_right(model):
    def swept(position: str) -> Tensor:
        cells = [(swap(Location("block_output", layer, position), OTHER),) for layer in range(3)]
        return sweep(model, Run(BASE), cells, lambda output: output[:, -1, 5])

    assert 0 == wrong_of([lambda: swept("l1"), lambda: swept("f1"), lambda: model(**BASE).logits], times=12)


def test_what_ends_a_reading_ends_no_other_forward(model):
    want, found = model(**BASE).logits, []

    def interrupt(*_: object) -> None:
        if threading.current_thread() is threading.main_thread():
            try:
                found.append(meanwhile(lambda: model(**BASE).logits))
            except Stop:
                found.append(None)

    handle = hook_before(model.model.layers[0], interrupt)
    read(model, BASE, AT)
    handle.remove()
    assert len(found) == 1 and torch.equal(found[0], want)


def test_a_hook_that_is_half_added_or_removed_is_passed_by(model):
    want = model(**BASE).logits
    called: list[object] = []
    handle = hook_before(model, lambda *given: called.append(given))
    model(**BASE)
    model._forward_pre_hooks_with_kwargs.clear()  # what a forward of another thread may find
    assert torch.equal(model(**BASE).logits, want) and len(called) == 1
    handle.remove()
