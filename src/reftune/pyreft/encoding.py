"""Prompt and output as pyreft tokenises them, but a label always remains, and the boundary is exact."""

from __future__ import annotations

from typing import Any

from reftune.errors import ReftuneError

IGNORE_INDEX = -100


def encode_pair(tokenizer: Any, prompt: str, output: str, max_length: int | None = None) -> tuple[list[int], int]:
    """Token ids of prompt and output, and how many of them are the prompt.

    The two are tokenised together, as pyreft does, unless a token would span the boundary; then apart. What exceeds the
    limit is taken from the prompt's beginning, and from the output's end where that alone fills the limit.

    Args:
        tokenizer: a transformers tokenizer.
        prompt: the prompt, in the model's template.
        output: what is learned, with its end token.
        max_length: most tokens; by default the tokenizer's limit.

    Raises:
        ReftuneError: a prompt or output without a token.
    """
    limit = max_length if max_length is not None else tokenizer.model_max_length
    front: list[int] = list(tokenizer(prompt).input_ids)
    whole: list[int] = list(tokenizer(prompt + output).input_ids)
    if whole[: len(front)] != front:
        whole = front + list(tokenizer(output, add_special_tokens=False).input_ids)
    back = whole[len(front) :]
    if not front or not back:
        raise ReftuneError(f"prompt {prompt[:40]!r} with output {output[:40]!r}: each needs at least one token.")
    if len(whole) > limit:
        room = max(limit - len(back), min(len(front), limit // 2), 1)
        front, back = front[-room:], back[: limit - min(room, len(front))]
    return front + back, len(front)


def labels_of(ids: list[int], prompt_length: int) -> list[int]:
    """The ids, with -100 for the prompt."""
    return [IGNORE_INDEX] * prompt_length + ids[prompt_length:]
