"""transformers' continuous batching: what each packed token belongs to, and which cached blocks may be shared.

Continuous batching lays the tokens of many requests into one row and says nothing of requests to the model. Two things
that transformers offers are enough to know them:

- a request's free keyword arguments (``add_request(..., **logit_processor_kwargs)``) travel with it through chunks,
  forks, preemption and offloading: one of them is what it ``Carried``;
- a scheduler type may be registered: ours schedules as transformers' own, and leaves on the cache, which every forward
  is given, whose tokens come next (``SPANS``).

transformers shares a block of the cache between requests whose tokens are equal up to its end. Under edits that is not
enough: the edits must be equal too. Blocks that hold edited tokens are therefore hashed by ``keyed`` tokens, which name
the adapter's weights and the edited places; all other blocks stay shared between adapters and with the base model.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from reftune.engine.position_grammar import Positions
from reftune.engine.position_plan import NOTHING, PositionPlan, Rows
from reftune.engine.positions import Part
from reftune.engine.row_plan import EditedRange, Run, Tokens, edited_runs, edits_inside
from reftune.errors import ReftuneError

SPANS = "_reftune_spans"
CARRIED = "reftune"
SCHEDULER = "reftune"


class CarriedEdits(NamedTuple):
    """One adapter of a request.

    Attributes:
        adapter: as whoever applies the edits knows it.
        ranges: the request's edited ordinals.
        key: equal keys are equal edits: of the weights and the strength.
    """

    adapter: Any
    ranges: tuple[EditedRange, ...]
    key: str


@dataclass(frozen=True, eq=False)
class Carried:
    """What a request carries from its submission to every forward.

    Attributes:
        edits: its adapters, in the order they edit.
        when_cancelled: is called, in the thread that runs the batches, once no forward will hold the request any more.
    """

    edits: tuple[CarriedEdits, ...] = ()
    when_cancelled: Callable[[], None] | None = None

    def __deepcopy__(self, memo: Any) -> Carried:  # forks and preempted requests are deep copies
        return self


class Span(NamedTuple):
    """A request's tokens in one forward, in the order of the packed rows."""

    carried: Carried
    computed: int
    scheduled: int


def packed_runs(spans: Sequence[Span]) -> list[list[Run]]:
    """The edited rows of a packed batch: first those of the requests' first adapters, then of their second, and so on.

    Rows of one list are edited by one adapter each, so that a list can be applied at once.
    """
    orders: list[list[Run]] = []
    row = 0
    for carried, computed, scheduled in spans:
        for order, (adapter, ranges, _) in enumerate(carried.edits):
            found = edited_runs([Tokens(adapter, ranges, computed, scheduled)], row)
            if found:
                orders += [[] for _ in range(order + 1 - len(orders))]
                orders[order] += found
        row += scheduled
    return orders


def keyed(carried: Carried, tokens: list[int], size: int) -> list[int]:
    """The tokens as the cache is to hash them: an edited block is named after its tokens, its edits and their weights.

    Args:
        carried: by the request.
        tokens: of the request.
        size: tokens of a block.
    """
    named = list(tokens)
    for start in range(0, len(tokens) - size + 1, size) if carried.edits else ():
        inside = [
            (key, found) for _, ranges, key in carried.edits if (found := edits_inside(ranges, start, start + size))
        ]
        if inside:
            text = repr(([(k, [tuple(r) for r in found]) for k, found in inside], tokens[start : start + size]))
            digest = hashlib.blake2b(text.encode(), digest_size=4 * min(4, size)).digest()
            named[start : start + size] = [*array("i", digest), *[0] * (size - len(digest) // 4)]
    return named


class PackedPlan(PositionPlan):
    """The plan of a packed forward whose requests name adapters of the engine.

    Args:
        spans: what lies in the batch.
    """

    def __init__(self, spans: Sequence[Span]):
        self._spans = spans
        self._runs = packed_runs(spans)
        names = dict.fromkeys(edits.adapter for span in spans for edits in span.carried.edits)
        super().__init__(None, None, False, list(names))

    @property
    def edits_anything(self) -> bool:
        """Whether any token is edited."""
        return bool(self._runs)

    def _find(self, positions: Positions, part: Part, hidden: Tensor, adapter: str) -> Rows:
        tokens, held = sum(span.scheduled for span in self._spans), hidden.numel() // hidden.shape[-1]
        if held < tokens:
            raise ReftuneError(
                f"This forward has {tokens} packed tokens but the edited tensor holds {held}: the model changes the "
                "sequence between its input and this site, which continuous batching cannot follow. Use generate."
            )
        rows = [
            row
            for runs in self._runs
            for run in runs
            if run.adapter == adapter and part in ("both", run.part)
            for row in range(run.start, run.stop)
        ]
        return torch.tensor(rows, device=hidden.device) if rows else None


def packed_plan(spans: Sequence[Span]) -> PositionPlan | None:
    """The plan of a packed forward, for the engine's own edits."""
    plan = PackedPlan(spans)
    return plan if plan.edits_anything else NOTHING


def spans_of(kwargs: dict[str, Any]) -> list[Span] | None:
    """What lies in a packed forward, from the forward's arguments; None where it is not one."""
    return getattr(kwargs.get("cache"), SPANS, None)


def settings(config: Any) -> Any:
    """The continuous batching configuration under which edits are right: our scheduler, and no captured graphs.

    Args:
        config: a ``ContinuousBatchingConfig``, or None.

    Raises:
        ReftuneError: a version of transformers that offers no scheduler types, or settings under which edits would be
            lost.
    """
    _register_scheduler()
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    config = ContinuousBatchingConfig() if config is None else config
    graphs = getattr(config, "use_cuda_graph", None)
    if graphs is True or (isinstance(graphs, tuple) and any(graphs)):
        raise ReftuneError(
            f"use_cuda_graph={graphs!r}: a replayed graph runs no hook, so the edits would be lost. Leave it out."
        )
    for name in ("varlen_compile_config", "decode_compile_config", "default_compile_level"):
        if getattr(config, name, None):
            raise ReftuneError(
                f"{name}={getattr(config, name)!r}: edits are not made in compiled batches. Leave it out."
            )
    if getattr(config, "scheduler_type", None) not in ("fifo", SCHEDULER):
        raise ReftuneError(
            f"scheduler_type={getattr(config, 'scheduler_type', None)!r}: edits are made under 'fifo'. Leave it out."
        )
    return replace(config, scheduler_type=SCHEDULER, use_cuda_graph=False)


def carry(manager: Any, carried_by: Callable[[Sequence[int]], Carried]) -> Any:
    """Let every request that is added to a manager carry its adapters; **changes the manager**, which is returned.

    Args:
        manager: made with ``settings``.
        carried_by: gives what a request that has nothing yet is to carry, from its prompt.

    Raises:
        ReftuneError: a manager that was made before there were edits, or that checks no arguments by name.
    """
    if getattr(manager.continuous_batching_config, "scheduler_type", None) != SCHEDULER:
        raise ReftuneError(
            "This model keeps a continuous batching manager from before its edits, which would lose them: call "
            "model.destroy_cached_continuous_batching_manager() first."
        )
    known = getattr(manager.logit_processor, "supported_keys", None)
    if not isinstance(known, dict):
        raise ReftuneError(WITHOUT_SEAM)
    known[CARRIED] = Carried
    add = type(manager).add_request

    def add_request(input_ids: Sequence[int], *args: Any, **kwargs: Any) -> Any:
        check_prompt(input_ids, manager.num_return_sequences)
        if CARRIED not in kwargs:
            kwargs[CARRIED] = carried_by(input_ids)
        return add(manager, list(input_ids), *args, **kwargs)

    manager.add_request = add_request
    return manager


def check_prompt(prompt: Sequence[int], answers: int) -> None:
    """Refuse a prompt on which transformers' loop stops, with every request that it holds.

    Raises:
        ReftuneError: a prompt without tokens, or one token with several answers.
    """
    if len(prompt) <= (answers > 1):
        raise ReftuneError(
            f"a prompt of {len(prompt)} tokens with num_return_sequences={answers}: transformers' continuous batching "
            "needs one token, and two where it returns several answers. Give the prompt as often as answers are wanted."
        )


WITHOUT_SEAM = (
    "This version of transformers does not offer the scheduler types by which edits know the tokens of continuous "
    "batching: use generate, or another version (5.19 to 5.23 do)."
)


@lru_cache(maxsize=1)
def _register_scheduler() -> None:
    try:
        from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING, FIFOScheduler
    except ImportError:
        raise ReftuneError(WITHOUT_SEAM) from None

    class SpanScheduler(FIFOScheduler):
        """First in, first out; leaves what lies in each batch on the cache, and keys the blocks that may be shared."""

        def __init__(self, cache: Any, safety_margin: float | None, max_requests_per_batch: int):
            self.tokens_shared = self.preempted = 0
            super().__init__(cache, safety_margin, max_requests_per_batch)
            setattr(cache, SPANS, [])
            if not getattr(cache, "use_prefix_sharing", False):
                return
            if not self._key_blocks(cache):
                cache.use_prefix_sharing = cache.allow_block_sharing = False

        def _key_blocks(self, cache: Any) -> bool:
            """Hash blocks by keyed tokens; False where this version of transformers does it in another way."""
            allocators = list(getattr(cache, "cache_allocators", {}).values())
            sizes: set[Any] = {getattr(allocator, "tokens_per_page", None) for allocator in allocators}
            markers = [getattr(allocator, "mark_complete_blocks", None) for allocator in allocators]
            search = getattr(cache, "search_prefix_match", None)
            if search is None or None in markers or len(sizes) != 1 or None in sizes:
                return False
            (size,) = sizes

            def search_keyed(request: str, tokens: list[int]) -> int:
                found = search(request, keyed(carried_of(self.waiting_requests[request]), tokens, size))
                self.tokens_shared += found
                return found

            def marking(mark: Any) -> Any:
                def mark_keyed(request: str, tokens: list[int], count: int) -> None:
                    mark(request, keyed(carried_of(self.active_requests[request]), tokens, size), count)

                return mark_keyed

            cache.search_prefix_match = search_keyed
            for allocator, mark in zip(allocators, markers, strict=True):
                allocator.mark_complete_blocks = marking(mark)
            return True

        def schedule_batch(self, token_budget: int, cache_budget: int) -> Any:
            found = super().schedule_batch(token_budget, cache_budget)
            spans = [Span(carried_of(f.state), f.state.position_offset, f.query_length) for f in found[0] or ()]
            setattr(self.cache, SPANS, spans)
            return found

        def add_waiting_request(self, state: Any) -> None:
            self.preempted += bool(getattr(state, "_true_initial_tokens", 0))
            super().add_waiting_request(state)

        def clear_cancelled_requests(self) -> Any:
            states = super().clear_cancelled_requests()
            for state in states or ():
                if (tell := carried_of(state).when_cancelled) is not None:
                    tell()
            return states

    SCHEDULER_MAPPING[SCHEDULER] = SpanScheduler


def carried_of(state: Any) -> Carried:
    """What a request carries, from its state."""
    return state.logit_processor_kwargs.get(CARRIED) or Carried()
