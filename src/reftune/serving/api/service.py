"""From a checked request to the engine, and from its tokens to text: rendering, limits, the queue, cancelling."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from reftune.adapter.expression import parse_expression
from reftune.data.tokenising import Encoding
from reftune.errors import ReftuneError
from reftune.inference.loading import recorded_encoding
from reftune.models import TOKENIZER_FILES
from reftune.serving.api.bodies import Generation
from reftune.serving.api.errors import RequestError
from reftune.serving.api.keys import Keys, Permission
from reftune.serving.api.metrics import Metrics
from reftune.serving.api.writing import Choice, Piece
from reftune.serving.catalogue import Catalogue
from reftune.serving.requests import Sampling, TokenEngine
from reftune.users.store import user_of

logger = logging.getLogger("reftune.serve")
_ENCODINGS = 128
"""Adapters whose way of encoding is kept; some have a tokenizer of their own."""


@dataclass(frozen=True)
class Limits:
    """What one server takes on.

    Attributes:
        body_bytes: of a request.
        prompt_tokens: of a prompt; None: the model's context.
        new_tokens: of an answer.
        requests: answers being written or waiting at once; more are told to come again (429).
        seconds: from a request's arrival to its last token.
    """

    body_bytes: int = 2 * 2**20
    prompt_tokens: int | None = None
    new_tokens: int = 4096
    requests: int = 256
    seconds: float = 600.0


@dataclass(frozen=True)
class Target:
    """What a request's `model` names: the base, an adapter, or several with strengths."""

    name: str
    adapters: tuple[tuple[str, float], ...] = ()
    folders: tuple[Path, ...] = ()


class Service:
    """Everything between the routes and the engine.

    Args:
        engine: writes tokens.
        catalogue: the adapters that may be served.
        base_name: what the base model is called.
        limits: what is taken on.
        keys: who may ask for what.
    """

    def __init__(
        self,
        engine: TokenEngine,
        catalogue: Catalogue,
        base_name: str,
        limits: Limits | None = None,
        keys: Keys | None = None,
    ):
        self.engine, self.catalogue, self.base_name = engine, catalogue, base_name
        self.limits, self.keys = limits or Limits(), keys or Keys()
        self.started = int(time.time())
        self.open = 0
        self.draining = False
        gauges: dict[str, tuple[str, Callable[[], float]]] = {
            "running_requests": ("Answers being written or waiting.", lambda: self.open),
            "adapters": ("Adapters that can be asked for.", lambda: len(self.catalogue.names())),
        }
        for name, text in engine.statistics_help().items():
            gauges[name] = (text, lambda name=name: float(engine.statistics()[name]))
        self.metrics = Metrics(gauges)
        self._encodings: dict[Path, tuple[int, Encoding]] = {}

    def count(self, model: str, status: int) -> None:
        """Count a request that ended."""
        self.metrics.requests.labels(self.metrics.label(model), str(status)).inc()

    # What a model's name means

    def model_names(self, permission: Permission) -> list[str]:
        """The base and every adapter that a key may use."""
        return [name for name in (self.base_name, *self.catalogue.names()) if permission.allows(name)]

    def target(self, model: str, permission: Permission) -> Target:
        """Resolve `model`.

        Raises:
            RequestError: 404 where there is no such model, 403 where the key may not use it, 400 for a link elsewhere.
        """
        if model == self.base_name:
            terms: list[tuple[str, float]] = []
        elif self.catalogue.folder(model) is not None:
            terms = [(model, 1.0)]
        else:
            try:
                terms = parse_expression(model)
            except ReftuneError as error:
                raise RequestError(404, str(error), "model", "model_not_found") from None
        for name in [name for name, _ in terms] or [self.base_name]:
            if not permission.allows(name):
                raise RequestError(403, f"this key may not use the model {name!r}.", "model", "model_not_allowed")
        folders = [self.catalogue.folder(name) for name, _ in terms]
        for (name, _), folder in zip(terms, folders, strict=True):
            if folder is None:
                message = f"the model {name!r} is not served here; GET /v1/models lists those that are."
                raise RequestError(404, message, "model", "model_not_found")
            try:
                self.catalogue.refuse_links_out(folder)
            except ReftuneError as error:
                raise RequestError(400, str(error), "model", "adapter_unusable") from None
        return Target(model, tuple(terms), tuple(folder for folder in folders if folder is not None))

    def encoding(self, target: Target) -> Encoding:
        """How prompts become tokens for a target: as the first adapter was trained, or as the base's template says.

        Raises:
            RequestError: a folder whose tokenizer or run.yaml cannot be used, or has tokens that this base has not.
        """
        if not target.folders:
            return Encoding(self.engine.tokenizer, max_length=self.engine.context, on_long_prompt="error")
        user = user_of(target.folders[0])
        folder = user[0].path if user else target.folders[0]  # all users of a store are spoken to alike
        names = ("run.yaml", *TOKENIZER_FILES, ".")
        stamp = max((folder / name).stat().st_mtime_ns for name in names if (folder / name).exists())
        known = self._encodings.get(folder)
        if known is None or known[0] != stamp:
            try:
                encoding = replace(recorded_encoding(folder, self.engine.tokenizer), max_length=self.engine.context)
            except ReftuneError as error:
                raise RequestError(400, str(error), "model", "adapter_unusable") from None
            if len(encoding.tokenizer) > self.engine.vocabulary:
                raise RequestError(
                    400,
                    f"the tokenizer of {target.name!r} has {len(encoding.tokenizer)} tokens and the served base model "
                    f"{self.engine.vocabulary}: this adapter cannot share its base; use it with reftune generate.",
                    "model",
                    "adapter_unusable",
                )
            known = self._encodings[folder] = (stamp, encoding)
            while len(self._encodings) > _ENCODINGS:
                self._encodings.pop(next(iter(self._encodings)), None)
        return known[1]

    async def read_prompts(self, target: Target, prompts: Sequence[Any]) -> tuple[Encoding, list[list[int]]]:
        """Prompts as `prompt_ids` reads them, and the encoding; a tokenizer that has to be loaded holds nobody up."""
        encoding = await asyncio.to_thread(self.encoding, target)
        return encoding, [self.prompt_ids(encoding, prompt) for prompt in prompts]

    def prompt_ids(self, encoding: Encoding, prompt: Any) -> list[int]:
        """A text, messages or token ids as the model reads them.

        Raises:
            RequestError: a prompt that has no tokens, or that the template refuses.
        """
        if isinstance(prompt, list) and all(isinstance(token, int) for token in prompt):
            if max(prompt, default=0) >= self.engine.vocabulary:
                raise RequestError(
                    400, f"token {max(prompt)}: the vocabulary ends at {self.engine.vocabulary - 1}.", "prompt"
                )
            ids: Any = prompt
        elif isinstance(prompt, str):
            ids = encoding.tokenizer(prompt, verbose=False).input_ids
        else:
            try:
                ids = encoding.prompt_ids([prompt])[0]
            except ReftuneError as error:
                raise RequestError(400, str(error), "messages") from None
        if not ids:
            raise RequestError(400, "the prompt has no tokens.", "prompt")
        return list(ids)

    # Writing

    def room(self, body: Generation, prompt: Sequence[int], wanted: int | None) -> int:
        """How many tokens an answer may have.

        Raises:
            RequestError: the prompt, or prompt and answer, do not fit.
        """
        if max(body.biases, default=0) >= self.engine.vocabulary:
            raise RequestError(400, f"logit_bias: token ids end at {self.engine.vocabulary - 1}.", "logit_bias")
        context, most = self.engine.context, self.limits.prompt_tokens
        if (most is not None and len(prompt) > most) or len(prompt) >= context:
            limit = context if most is None else min(most, context)
            raise RequestError(
                400,
                f"the prompt has {len(prompt)} tokens; at most {limit} are read here.",
                "messages",
                "context_length_exceeded",
            )
        if wanted is not None and (len(prompt) + wanted > context or wanted > self.limits.new_tokens):
            raise RequestError(
                400,
                f"max_tokens={wanted}: with {len(prompt)} prompt tokens at most "
                f"{min(context - len(prompt), self.limits.new_tokens)} can be written.",
                "max_tokens",
                "context_length_exceeded",
            )
        return wanted or min(context - len(prompt), self.limits.new_tokens)

    def take(self, answers: int) -> None:
        """Count answers that begin.

        Raises:
            RequestError: 400 where the server never writes so many; 429 where too many are being written; 503 while it
                ends.
        """
        if answers > self.limits.requests:
            raise RequestError(
                400, f"{answers} answers are asked for; at most {self.limits.requests} can be at once.", "n"
            )
        if self.draining:
            raise RequestError(503, "the server is ending.", headers={"Retry-After": "5"})
        if not self.engine.alive:
            raise RequestError(503, "the model has stopped; see the server's log.")
        if self.open + answers > self.limits.requests:
            message = f"{self.open} answers are being written; at most {self.limits.requests} at once. Try again later."
            raise RequestError(429, message, code="rate_limit_exceeded", headers={"Retry-After": "1"})
        self.open += answers

    async def write(
        self,
        target: Target,
        encoding: Encoding,
        prompts: Sequence[list[int]],
        body: Generation,
        room: Sequence[int],
        logprobs: int | None,
    ) -> AsyncGenerator[tuple[Choice, Piece], None]:
        """Write `body.n` answers to each prompt (`take` counted them); leaving the loop cancels what is not done.

        Yields:
            A choice and what is new in it.

        Raises:
            RequestError: an adapter that cannot be loaded; a time limit; a failed engine.
        """
        number, begin, first = len(prompts) * body.n, time.perf_counter(), True
        label = self.metrics.label(target.name)
        self.metrics.prompt_tokens.labels(label).inc(sum(map(len, prompts)))
        queue: asyncio.Queue[tuple[Choice, Piece] | Exception] = asyncio.Queue()
        try:
            ends = encoding.stop_ids() if target.folders else ()
            async with AsyncExitStack() as stack:
                tasks = []
                for index in range(number):
                    prompt, seed = prompts[index // body.n], None if body.seed is None else body.seed + index % body.n
                    sampling = Sampling(
                        temperature=body.temperature, top_p=body.top_p, top_k=body.top_k, seed=seed,
                        repetition_penalty=body.repetition_penalty, frequency_penalty=body.frequency_penalty,
                        presence_penalty=body.presence_penalty, logit_bias=body.biases, logprobs=logprobs,
                    )  # fmt: skip
                    choice = Choice(index, encoding.tokenizer, body.stops, logprobs is not None, ends)
                    adapters = [
                        (folder, weight * body.scale)
                        for folder, (_, weight) in zip(target.folders, target.adapters, strict=True)
                    ]
                    writing = self._one(choice, prompt, adapters, room[index // body.n], sampling, queue)
                    tasks.append(asyncio.ensure_future(writing))
                    stack.callback(tasks[-1].cancel)
                left = number
                while left:
                    remaining = self.limits.seconds - (time.perf_counter() - begin)
                    try:
                        found = await asyncio.wait_for(queue.get(), max(remaining, 0.001))
                    except asyncio.TimeoutError:
                        raise RequestError(
                            504, f"no end after {self.limits.seconds:g} seconds.", code="timeout"
                        ) from None
                    if isinstance(found, Exception):
                        raise found
                    choice, piece = found
                    if first:
                        self.metrics.first_token.observe(time.perf_counter() - begin)
                        first = False
                    self.metrics.completion_tokens.labels(label).inc(len(piece.tokens))
                    left -= piece.finish is not None
                    yield choice, piece
                self.metrics.seconds.observe(time.perf_counter() - begin)
        finally:
            self.open -= number

    async def _one(
        self,
        choice: Choice,
        prompt: list[int],
        adapters: list[tuple[Path, float]],
        room: int,
        sampling: Sampling,
        queue: asyncio.Queue[tuple[Choice, Piece] | Exception],
    ) -> None:
        try:
            async with await self.engine.submit(
                prompt, adapters=adapters, max_new_tokens=room, sampling=sampling
            ) as stream:
                async for tokens, finish in stream:
                    queue.put_nowait((choice, choice.take(tokens, finish)))
                    if choice.finish:
                        return
        except ReftuneError as error:
            queue.put_nowait(RequestError(400, str(error), "model", "adapter_unusable"))
        except Exception as error:
            logger.exception("an answer failed")
            queue.put_nowait(RequestError(500, f"the answer failed: {type(error).__name__}."))
