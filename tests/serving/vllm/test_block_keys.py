from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from reftune.engine.position_grammar import parse_positions
from reftune.serving.vllm.block_keys import edit_key, keyed
from reftune.serving.vllm.requested import Known

BLOCK = 4
TEXTS = ("l1", "l3", "f2", "f2+l3", "f7+l7", "prompt", "generated", "l1+generated", "all")


def keys(known: Known, prompt: int, total: int, number: int = 1) -> list[tuple[str, str] | None]:
    return [edit_key(known, number, prompt, start, start + BLOCK) for start in range(0, total, BLOCK)]


@given(text=st.sampled_from(TEXTS), first=st.integers(1, 40), second=st.integers(1, 40))
def test_blocks_are_shared_exactly_as_far_as_the_same_tokens_are_edited(text: str, first: int, second: int) -> None:
    positions = parse_positions(text)
    known, total = Known("a", positions, digest="d"), 48
    edited = [positions.ordinals(prompt, total) for prompt in (first, second)]
    for index, (one, other) in enumerate(zip(keys(known, first, total), keys(known, second, total), strict=True)):
        inside = [{n for n in ordinals if index * BLOCK <= n < (index + 1) * BLOCK} for ordinals in edited]
        assert (one == other) == (inside[0] == inside[1])
        assert (one is None) == (not inside[0])


def test_keys_tell_ids_weights_and_halves_of_a_pair_apart() -> None:
    positions = parse_positions("f2+l2")
    variants = [
        keys(Known("a", positions, digest="d"), 4, 4),
        keys(Known("a", positions, digest="e"), 4, 4),
        keys(Known("a", positions, digest="d"), 4, 4, number=2),
        keys(Known("a", positions, True, "d"), 4, 4),
    ]
    assert len({tuple(variant) for variant in variants}) == len(variants)


def test_the_stock_key_keeps_what_is_not_the_adapters_and_lora_keeps_all() -> None:
    def stock(request: Any, start: int, stop: int, start_mm: int) -> tuple[tuple[Any, ...] | None, int]:
        names = [("lora", request.lora_request.lora_name, "path")] if request.lora_request else []
        salt = [("cache_salt", "s")] if start == 0 else []
        return tuple(names + salt) or None, start_mm + 1

    reft, lora = Known("a", parse_positions("l1"), digest="d"), Known("b")
    function = keyed(stock, lambda request: reft if request.lora_name == "a" else lora)
    request = SimpleNamespace(lora_request=SimpleNamespace(lora_name="a", lora_int_id=3), num_prompt_tokens=6)
    assert function(request, 0, 4, 0) == ((("cache_salt", "s"),), 1)
    assert function(request, 4, 8, 1) == ((("lora", "reftune:3:d:1-2b"),), 2)
    assert function(request, 8, 12, 2) == (None, 3)
    assert request.lora_request.lora_name == "a"
    request.lora_request.lora_name = "b"
    assert function(request, 4, 8, 1) == ((("lora", "b", "path"),), 2)
    assert function(SimpleNamespace(lora_request=None), 4, 8, 1) == (None, 2)
