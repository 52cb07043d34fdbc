"""Answers to prompts: batches, padded on the left, greedy or sampled, with the edit or without it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import GenerationConfig

from reftune.errors import ReftuneError
from reftune.inference.loading import EditedModel
from reftune.inference.settings import GenerationSettings


@dataclass(frozen=True)
class Answer:
    """One answer: its text, its tokens, and whether it stopped at the limit rather than by itself."""

    text: str
    tokens: int
    hit_limit: bool


def generate_answers(
    edited: EditedModel, prompts: Sequence[Any], settings: GenerationSettings | None = None, *, base: bool = False
) -> Iterator[Answer]:
    """Answer prompts in order, a batch at a time.

    Args:
        edited: the model.
        prompts: texts, messages or examples.
        settings: how to write.
        base: without the edit.

    Raises:
        ReftuneError: a prompt that leaves no room for an answer; nothing is generated then.
    """
    settings = settings or GenerationSettings()
    rows = prompt_rows(edited, prompts, settings.max_new_tokens)
    return _generate(edited, rows, settings, base)


def prompt_rows(edited: EditedModel, prompts: Sequence[Any], room: int) -> list[list[int]]:
    """Prompts as token ids.

    Raises:
        ReftuneError: one that does not fit the model's context together with `room` new tokens.
    """
    rows = edited.encoding.prompt_ids(prompts)
    limit = edited.encoding.limit
    for number, row in enumerate(rows, start=1):
        if limit is not None and len(row) + room > limit:
            which = f"prompt {number} of {len(rows)}" if len(rows) > 1 else "the prompt"
            which = getattr(prompts[number - 1], "where", "") or which
            raise ReftuneError(
                f"{which} has {len(row)} tokens; with {room} new ones that is more than the model's {limit}: "
                "shorten it, or lower --max-new-tokens."
            )
    return rows


def generation_config(edited: EditedModel, settings: GenerationSettings) -> GenerationConfig:
    """The model's generation settings with ours in place of those that choose tokens."""
    base: Any = edited.model.get_base_model()
    config = copy.deepcopy(base.generation_config)
    sampled = settings.temperature > 0
    config.do_sample = sampled
    config.temperature = settings.temperature if sampled else None
    config.top_p = settings.top_p if sampled else None
    config.top_k = settings.top_k or None if sampled else None
    config.repetition_penalty = settings.repetition_penalty
    if settings.no_repeat_ngram:
        config.no_repeat_ngram_size = settings.no_repeat_ngram
    config.max_new_tokens = settings.max_new_tokens
    config.max_length = None
    config.eos_token_id = stop_tokens(edited)
    config.pad_token_id = edited.tokenizer.pad_token_id
    return config


def stop_tokens(edited: EditedModel) -> list[int]:
    """The tokens that end an answer: the model's own, and the one that closed completions in training."""
    base: Any = edited.model.get_base_model()
    own = base.generation_config.eos_token_id
    found = [*(own if isinstance(own, (list, tuple)) else [own]), *edited.encoding.stop_ids()]
    return sorted({int(token) for token in found if token is not None})


def left_padded(rows: Sequence[Sequence[int]], pad: int, device: Any) -> dict[str, Int[Tensor, "batch position"]]:
    """`input_ids` and `attention_mask` of rows that all end where their answers begin."""
    longest = max(map(len, rows))
    ids = [[pad] * (longest - len(row)) + list(row) for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return {"input_ids": torch.tensor(ids, device=device), "attention_mask": torch.tensor(mask, device=device)}


def _generate(edited: EditedModel, rows: list[list[int]], settings: GenerationSettings, base: bool) -> Iterator[Answer]:
    model, pad = edited.model, int(edited.tokenizer.pad_token_id)  # type: ignore[arg-type]
    config = generation_config(edited, settings)
    stops = set(stop_tokens(edited))
    torch.manual_seed(settings.seed)
    for start in range(0, len(rows), settings.batch_size):
        batch = left_padded(rows[start : start + settings.batch_size], pad, model.device)
        with torch.no_grad(), model.disable_adapter() if base else nullcontext():
            written: Any = model.generate(**batch, generation_config=config)
        for row in written[:, batch["input_ids"].shape[1] :].tolist():
            end = next((index for index, token in enumerate(row) if token in stops), len(row))
            yield Answer(edited.encoding.answer_text(row[:end]), end, end == len(row))
