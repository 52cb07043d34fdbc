"""Which requests may share a block of vLLM's prefix cache.

A block's hash is chained to those before it, so two requests share exactly the blocks up to whose end every token saw
the same edits, if a block's key names the edits inside the block. vLLM's own key is the adapter's name on every block,
which is wrong here in two ways: the last prompt token of one turn is an ordinary token of the next turn, and the tokens
before a prompt's edited end are those of the base model, for every adapter.

The key holds the weights' digest, so that blocks kept elsewhere survive no change of weights, and the adapter's id, for
which a worker never changes its weights (``requested.py``), whatever happens on disk meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from reftune.engine.row_plan import edited_ranges, edits_inside
from reftune.serving.vllm.requested import Known

Keys = tuple[tuple[Any, ...] | None, int]


def edit_key(known: Known, number: int, prompt_length: int, start: int, stop: int) -> tuple[str, str] | None:
    """What a block's key says of the edits of tokens ``start`` to ``stop - 1``; None where there are none.

    The form is that of vLLM's own adapter key, which its event publisher can unpack.
    """
    if known.positions is None:
        return None
    inside = edits_inside(edited_ranges(known.positions, prompt_length, known.untied), start, stop)
    if not inside:
        return None
    where = ",".join(f"{a}-{b}{part[0]}" for a, b, part in inside)
    return ("lora", f"reftune:{number}:{known.digest}:{where}")


def keyed(stock: Callable[..., Keys], known_of: Callable[[Any], Known]) -> Callable[..., Keys]:
    """The stock ``generate_block_hash_extra_keys`` with the key of the edits in place of the adapter's name."""

    def generate_block_hash_extra_keys(request: Any, start: int, stop: int, start_mm: int) -> Keys:
        lora_request = request.lora_request
        if lora_request is None or (known := known_of(lora_request)).digest is None:
            return stock(request, start, stop, start_mm)
        request.lora_request = None  # the stock function reads the adapter's name off the request
        try:
            keys, next_mm = stock(request, start, stop, start_mm)
        finally:
            request.lora_request = lora_request
        key = edit_key(known, lora_request.lora_int_id, request.num_prompt_tokens, start, stop)
        return ((*(keys or ()), key) if key else keys), next_mm

    return generate_block_hash_extra_keys
