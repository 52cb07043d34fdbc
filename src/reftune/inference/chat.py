"""A conversation with an adapter: answers arrive piece by piece, the newest prompt alone is edited."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from reftune.data.formats import Message
from reftune.data.values import check_text
from reftune.errors import ReftuneError
from reftune.inference.generation import GenerationSettings, generation_config, left_padded, prompt_rows
from reftune.inference.loading import EditedModel


class _StopWhenAsked(StoppingCriteria):
    def __init__(self) -> None:
        self.asked = threading.Event()

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        return torch.full((input_ids.shape[0],), self.asked.is_set(), dtype=torch.bool, device=input_ids.device)


class Conversation:
    """Turns so far, and the next answer.

    Each answer reads the whole conversation again, with the model's chat template, as one prompt: positions count from
    its ends, so earlier answers are read as text and were not edited by earlier turns' edits.

    Args:
        edited: the model.
        settings: how to write.
    """

    def __init__(self, edited: EditedModel, settings: GenerationSettings) -> None:
        self.edited = edited
        self.settings = settings
        self.uses_edit = True
        self.turns: list[Message] = []
        self.forgotten = 0

    def reset(self) -> None:
        """Forget every turn."""
        self.turns.clear()
        self.forgotten = 0

    def ask(self, text: str) -> Generator[str, None, None]:
        """Add the user's turn and stream the answer, which becomes a turn when it ends, or is broken off by closing.

        Where the conversation outgrows the model's context, its oldest turns are left out (`forgotten` counts them).

        Raises:
            ReftuneError: the turn is no Unicode, or alone longer than the context.
        """
        self.turns.append(Message("user", check_text(text, "what was typed")))
        try:
            row = self._fitting_row()
        except ReftuneError:
            self.turns.pop()
            raise
        pieces: list[str] = []
        try:
            for piece in self._without_opening(self._stream(row)):
                pieces.append(piece)
                yield piece
        finally:
            self.turns.append(Message("assistant", "".join(pieces).strip()))

    def _fitting_row(self) -> list[int]:
        while True:
            try:
                return prompt_rows(self.edited, [list(self.turns)], self.settings.max_new_tokens)[0]
            except ReftuneError:
                if len(self.turns) < 3:
                    raise
                del self.turns[:2]
                self.forgotten += 2

    def _without_opening(self, pieces: Iterator[str]) -> Iterator[str]:
        """The pieces of an answer, but for what the template puts before one."""
        opening, held = self.edited.encoding.shown_opening, ""
        for piece in pieces:
            held += piece
            if opening.startswith(held.lstrip()[: len(opening)]) and len(held.lstrip()) <= len(opening):
                continue  # it may yet be that
            yield self.edited.encoding.without_opening(held.lstrip())
            break
        else:
            if rest := self.edited.encoding.without_opening(held.strip()):
                yield rest
        yield from pieces

    def _stream(self, row: list[int]) -> Iterator[str]:
        model, tokenizer = self.edited.model, self.edited.tokenizer
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)  # type: ignore[arg-type]
        stop, failure = _StopWhenAsked(), []
        batch = left_padded([row], int(tokenizer.pad_token_id), model.device)  # type: ignore[arg-type]
        config = generation_config(self.edited, self.settings)
        uses_edit = self.uses_edit

        def write() -> None:
            try:
                with torch.no_grad(), nullcontext() if uses_edit else model.disable_adapter():
                    model.generate(
                        **batch,
                        generation_config=config,
                        streamer=streamer,
                        stopping_criteria=StoppingCriteriaList([stop]),
                    )
            except BaseException as error:
                failure.append(error)
                streamer.end()

        writer = threading.Thread(target=write, daemon=True)
        writer.start()
        try:
            yield from streamer
        finally:
            stop.asked.set()
            writer.join()
        if failure:
            raise failure[0]
