"""The embedded engine: many requests for many adapters on one model in this process, by continuous batching.

::

    engine = EmbeddedEngine(model, tokenizer)
    engine.start()
    async with await engine.submit(ids, adapters=[(Path("adapters/poet"), 1.0)], max_new_tokens=64) as stream:
        async for tokens, finish in stream:      # lists of `Token`; at last why it ended
            ...
    engine.close()                               # answers under way are written to their end

Every request has its own adapters, strengths and sampling. Adapters come from a `Bank`: no module each, nothing changed
in the model but hooks, which `close` removes.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import queue
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessor

from reftune.engine.packed import CARRIED, Carried, CarriedEdits, carry, settings
from reftune.engine.transformers_names import page_of
from reftune.errors import ReftuneError
from reftune.runs.fingerprint import base_digest, other_base
from reftune.serving.bank import Bank, Held
from reftune.serving.packed_attention import attending_by_request
from reftune.serving.packed_edits import PackedEdits
from reftune.serving.requests import Finish, Sampling, Token
from reftune.serving.sampling import Choosing
from reftune.users.names import is_store

ANSWER = "reftune_answer"
logger = logging.getLogger(__name__)
_Item = tuple[list[Token], Finish | None] | Exception


class _Answer:
    """One answer being written: between the thread that runs the batches and the event loop that asked for it."""

    def __init__(self, choosing: Choosing, ends: frozenset[int], room: int, loop: asyncio.AbstractEventLoop):
        self.choosing, self.ends, self.room, self.loop = choosing, ends, room, loop
        self.items: asyncio.Queue[_Item] = asyncio.Queue()
        self.held: list[Held] = []
        self.done = False

    def __deepcopy__(self, memo: Any) -> _Answer:  # a preempted request is a deep copy
        return self

    def next(self, logits: torch.Tensor, likeliest: int) -> tuple[Token, Finish | None]:
        token = self.choosing.next(logits, likeliest)
        if token.id in self.ends:
            return token, "stop"
        return token, "length" if len(self.choosing.written) >= self.room else None


class _Chooser(ContinuousBatchingLogitsProcessor):
    """Chooses each request's token and leaves transformers' argmax nothing else to take; hands tokens out at once."""

    supported_kwargs: dict[str, type] = {CARRIED: Carried, ANSWER: _Answer}
    ignored_kwargs: tuple[str, ...] = ()

    def __init__(self, engine: EmbeddedEngine):
        self._engine = engine
        self._answers: list[_Answer] = []

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> torch.Tensor:
        self._answers = [request.state.logit_processor_kwargs[ANSWER] for request in requests_with_new_token]
        return torch.zeros(len(self._answers), dtype=torch.int32)

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        rows = scores[: len(self._answers)]  # requests whose prompt is not read to its end have rows behind
        likeliest = rows.argmax(-1).tolist()
        out: dict[asyncio.AbstractEventLoop, list[tuple[_Answer, _Item]]] = {}
        chosen = []
        for answer, logits, best in zip(self._answers, rows, likeliest, strict=True):
            token, finish = answer.next(logits, best)
            chosen.append(token.id)
            if finish is not None:
                self._engine._release(answer)
            out.setdefault(answer.loop, []).append((answer, ([token], finish)))
        for loop, items in out.items():
            _hand_over(loop, items)
        if chosen == likeliest:
            return scores
        index = torch.tensor(chosen, device=scores.device).unsqueeze(-1)
        picked = torch.full_like(rows, -torch.inf).scatter_(1, index, 0.0)
        return torch.cat([picked, scores[len(rows) :]])


def _hand_over(loop: asyncio.AbstractEventLoop, items: list[tuple[_Answer, _Item]]) -> None:
    def put() -> None:
        for answer, item in items:
            answer.items.put_nowait(item)

    if not loop.is_closed():  # whoever asked has gone
        loop.call_soon_threadsafe(put)


class TokenStreaming:
    """An answer's tokens as they are written; leaving the ``async with`` block cancels what is not."""

    def __init__(self, engine: EmbeddedEngine, request: str, answer: _Answer):
        self._engine, self._request, self._answer = engine, request, answer

    async def __aenter__(self) -> AsyncIterator[tuple[list[Token], Finish | None]]:
        return self._tokens()

    async def __aexit__(self, *_: object) -> None:
        self._engine._cancel(self._request, self._answer)

    async def _tokens(self) -> AsyncIterator[tuple[list[Token], Finish | None]]:
        while True:
            item = await self._answer.items.get()
            if isinstance(item, Exception):
                raise item
            yield item
            if item[1] is not None:
                return


class EmbeddedEngine:
    """Writes answers with the adapters of a bank; a ``TokenEngine``.

    Args:
        model: a causal language model without edits; **hooks are added** until ``close``.
        tokenizer: of the model.
        bank: the adapters; None: an empty one with the default budget.
        cache_tokens: of keys and values to keep, for all requests together; also bounds a request.
        batch_tokens: in one forward; longer prompts are read in chunks.
        requests: in one forward.
        page_tokens: of one block of the cache, the grain in which requests share it.
        context: the most tokens of a prompt and its answer; None: as many as model and cache allow.
        share_prefixes: compute what requests have in common once.

    Attributes:
        bank: the adapters.
        context: the most tokens that a prompt and its answer may have.
        vocabulary: how many token ids there are.

    Raises:
        ReftuneError: a model that carries edits, or a version of transformers that cannot batch them.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        bank: Bank | None = None,
        *,
        cache_tokens: int = 16_384,
        batch_tokens: int = 2048,
        requests: int = 64,
        page_tokens: int = 32,
        context: int | None = None,
        share_prefixes: bool = True,
    ):
        self.model, self.tokenizer, self.bank = model.eval(), tokenizer, bank or Bank()
        text = model.config.get_text_config()
        self.vocabulary = int(text.vocab_size)
        stated = (context, getattr(text, "max_position_embeddings", None), cache_tokens - page_tokens)
        self.context = min(limit for limit in stated if limit)
        self._config = settings(
            ContinuousBatchingConfig(
                num_blocks=-(-cache_tokens // page_tokens), max_batch_tokens=batch_tokens, **page_of(page_tokens),
                max_requests_per_batch=requests, allow_block_sharing=share_prefixes, use_async_batching=False,
            )
        )  # fmt: skip
        ends = getattr(model.generation_config, "eos_token_id", None)
        ends = [*(ends if isinstance(ends, list) else [ends]), getattr(tokenizer, "eos_token_id", None)]
        self._ends = frozenset(token for token in ends if token is not None)
        self._undo = ExitStack()
        self._undo.callback(PackedEdits(model, self.bank).remove)
        self._numbers = itertools.count()
        self._manager: Any = None
        self._hits = 0
        self._judged: set[Path] = set()
        self._digest = cache(base_digest)
        self._lock = threading.Lock()

    # Life

    @property
    def alive(self) -> bool:
        """Whether it can write: started, not closed, and no forward has failed."""
        return self._manager is not None and self._manager.is_running()

    def start(self) -> None:
        """Begin to work, in a thread of its own."""
        if self.alive:
            return
        generation = GenerationConfig(do_sample=False, eos_token_id=sorted(self._ends) or -1)
        manager: Any = type(self.model).init_continuous_batching(self.model, generation, self._config)
        self._manager = carry(manager, lambda prompt: Carried())
        processors = manager.logit_processor
        processors.logits_processor.append(_Chooser(self))
        processors.tensors_required += 1
        processors.do_processing = True
        processors.supported_keys.update(_Chooser.supported_kwargs)
        self._undo.enter_context(attending_by_request(self.model))
        manager.start()

    def close(self) -> None:
        """Write what has begun to its end, stop, and **take the hooks off the model**."""
        if self._manager is not None:
            self._manager.stop(block=True)
            self._manager.destroy()
        self._undo.close()

    def __enter__(self) -> EmbeddedEngine:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Adapters

    def check(self, folder: Path) -> None:
        """Read an adapter.

        Raises:
            ReftuneError: it cannot be read, or does not fit the model.
        """
        self.bank.give_back(self._take(folder, 1.0))

    def edited(self, folders: Sequence[Path], length: int) -> list[int]:
        """Which tokens of a prompt are edited by any of these adapters.

        Raises:
            ReftuneError: an adapter that cannot be read, or does not fit the model.
        """
        found: set[int] = set()
        for folder in folders:
            held = self._take(folder, 1.0)
            for start, stop, _ in held.ranges(length):
                found.update(range(start, min(stop, length)))
            self.bank.give_back(held)
        return sorted(found)

    def _take(self, folder: Path, scale: float) -> Held:
        name, loads = str(folder), self.bank.loads
        self.bank.add(name, folder)
        held = self.bank.take(name, scale)
        if self.bank.loads == loads:
            with self._lock:
                self._hits += 1
        else:
            self._judge_base(folder.parent if is_store(folder.parent) else folder)
        return held

    def _judge_base(self, folder: Path) -> None:
        if folder not in self._judged:
            self._judged.add(folder)
            with suppress(ReftuneError):  # a damaged fingerprint says nothing of the base
                if warning := other_base(folder, self.model, self._digest):
                    logger.warning(warning)

    # Answers

    async def submit(
        self,
        prompt: Sequence[int],
        *,
        adapters: Sequence[tuple[Path, float]] = (),
        max_new_tokens: int,
        sampling: Sampling | None = None,
    ) -> TokenStreaming:
        """Ask for an answer.

        Args:
            prompt: token ids.
            adapters: folders with their strengths, in the order they edit; none: the base model.
            max_new_tokens: at least 1.
            sampling: how its tokens are chosen; None: greedily.

        Returns:
            The answer's tokens as they are written, to be entered with ``async with``.

        Raises:
            ReftuneError: an adapter that cannot be read or does not fit, a prompt without tokens or with ids that the
                model does not have, more tokens than fit, settings out of range, or an engine that has stopped.
        """
        ids = list(prompt)
        if not self.alive:
            raise ReftuneError("The engine does not run: start() it, or see its log for why it stopped.")
        if not ids or min(ids) < 0 or max(ids) >= self.vocabulary:
            raise ReftuneError(f"a prompt needs token ids from 0 to {self.vocabulary - 1}, at least one.")
        if max_new_tokens < 1 or len(ids) + max_new_tokens > self.context:
            raise ReftuneError(
                f"a prompt of {len(ids)} tokens and max_new_tokens={max_new_tokens}: write at least 1, and at most "
                f"{self.context} tokens together."
            )
        sampling = sampling or Sampling()
        if any(not 0 <= token < self.vocabulary for token in sampling.logit_bias):
            raise ReftuneError(f"logit_bias: token ids lie between 0 and {self.vocabulary - 1}.")
        answer = _Answer(Choosing(sampling, ids), self._ends, max_new_tokens, asyncio.get_running_loop())
        request = f"answer-{next(self._numbers)}"
        try:
            for folder, scale in adapters:
                answer.held.append(self._take(folder, scale))
            edits = tuple(CarriedEdits(held, held.ranges(len(ids)), held.key) for held in answer.held)
            carried = Carried(edits, when_cancelled=lambda: self._release(answer))
            self._manager.register_result_handler(request, lambda result: self._ended(answer, result))
            arguments = {CARRIED: carried, ANSWER: answer}
            if self._manager.add_request(ids, request, max_new_tokens=max_new_tokens, **arguments) is None:
                raise ReftuneError("The engine is stopping and takes no more requests.")
        except BaseException:
            self._release(answer)
            raise
        return TokenStreaming(self, request, answer)

    def _ended(self, answer: _Answer, result: Any) -> None:
        """Told by transformers when a request is over; its tokens are out already, unless it failed."""
        if result.error is not None:
            error = RuntimeError(f"the answer could not be written: {result.error}")
            _hand_over(answer.loop, [(answer, error)])

    def _release(self, answer: _Answer) -> None:
        with self._lock:
            held, answer.held, answer.done = answer.held, [], True
        for one in held:
            self.bank.give_back(one)

    def _cancel(self, request: str, answer: _Answer) -> None:
        if not answer.done:
            self._manager.cancel_request(request)
        router = self._manager.output_router
        with router._lock:
            router.result_handlers.pop(request, None)
        # Tokens are out before transformers delivers the whole answer, which nobody then takes: it would stay for ever.
        with suppress(queue.Empty):
            while True:
                router.output_queue.get_nowait()

    # Numbers

    def statistics_help(self) -> dict[str, str]:
        """What each number of ``statistics`` is."""
        return {
            "bank_adapters": "Adapters in memory.",
            "bank_bytes": "Bytes of the adapters in memory.",
            "bank_hits": "Answers whose adapter was in memory already.",
            "bank_loads": "Adapter folders read.",
            "bank_evictions": "Adapters thrown out for room.",
            "prefix_tokens": "Prompt tokens that were taken from the cache.",
            "preemptions": "Answers thrown back to their start for room in the cache.",
        }

    def statistics(self) -> dict[str, float]:
        """Numbers since the start."""
        processor = getattr(self._manager, "batch_processor", None)
        scheduler = getattr(processor, "scheduler", None)
        found = {
            "bank_adapters": len(self.bank.loaded),
            "bank_bytes": self.bank.nbytes,
            "bank_hits": self._hits,
            "bank_loads": self.bank.loads,
            "bank_evictions": self.bank.evictions,
            "prefix_tokens": getattr(scheduler, "tokens_shared", 0),
            "preemptions": getattr(scheduler, "preempted", 0),
        }
        return {name: float(number) for name, number in found.items()}
