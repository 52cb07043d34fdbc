"""One plan a forward: reads each forward of a model, remembers what ``generate`` was given, and hands out plans."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from transformers.utils import logging

from reftune.engine.forwards import Role, batch_rows, bind, generation_prompt, is_encoder_decoder, token_arguments
from reftune.engine.packed import packed_plan, spans_of
from reftune.engine.position_grammar import Positions
from reftune.engine.position_plan import NOTHING, Mask, PositionPlan
from reftune.engine.positions import is_token_mask
from reftune.engine.prompt_memory import PromptMemory
from reftune.engine.traced_layout import layout_of
from reftune.engine.transformers_names import checkpoints_activations
from reftune.errors import ReftuneError

CALL_ARGUMENTS = ("prompt_lengths", "intervention_mask", "intervention_directions")
"""Arguments of ours that any forward takes; they are taken out before the model sees them."""

TWO_FORWARDS = (
    "Two forwards await one backward under gradient checkpointing, with an edit inside the block, on a model that does "
    "not hand keyword arguments to its attention: the rows of the first can no longer be told. Run backward after each "
    "forward, switch gradient checkpointing off, or use component='block_output'."
)

NO_TOKENS = (
    "{kind} was called by itself, with an attention_mask and hidden states in place of tokens, which do not say where "
    "padding is. Call the whole model, pass an intervention_mask (batch, sequence), or use positions='all'."
)

OUTSIDE = (
    "An edited block ran outside of a forward of the model or of the stack that owns the block, so its tokens are not "
    "known. Call the model itself (or that stack, not its .forward), or detach or disable the edits before."
)

CHECKPOINTED_GENERATION = (
    "generate in training mode with gradient checkpointing runs without a cache: transformers drops the cache inside "
    "checkpointed layers, and each step would see its last token alone. model.eval() makes it fast again."
)
logger = logging.get_logger(__name__)


@dataclass
class _Call:
    """A forward under way: the module that began it, and the plan of each of its stacks."""

    module: nn.Module
    with_grad: bool
    running: bool = False
    plans: dict[str, PositionPlan | None] = field(default_factory=dict)
    counted: bool = False


class _Awaiting:
    """One thread's checkpointed forwards whose backward will not be given their plan."""

    def __init__(self) -> None:
        self.forwards = 0
        self.recomputed = False
        self.plans: dict[str, PositionPlan | None] = {}


class _UnderWay(threading.local):
    """What is under way in one thread: another thread's forwards are never seen here, nor disturbed.

    A thread-local rather than a context variable, because a forward never gives way to another in its thread, and
    because ``torch.compile`` traces through the one and not through the other.

    Attributes:
        calls: forwards begun and not ended, the innermost last.
        memories: calls of ``generate``, the innermost last.
        row_adapters: in a batch of mixed adapters, each row's.
        handed: the block whose hook was last given a plan as a keyword argument, and that plan.
        awaiting: what backward may recompute.
    """

    def __init__(self) -> None:
        self.calls: list[_Call] = []
        self.memories: list[PromptMemory] = []
        self.row_adapters: list[str] | None = None
        self.handed: tuple[Any, PositionPlan | None] | None = None
        self.awaiting = _Awaiting()


def by_adapter(value: Any, names: Iterable[str]) -> dict[str, Tensor]:
    """A call argument by adapter name: as given, or the same for every name."""
    if value is None:
        return {}
    given = value if isinstance(value, Mapping) else dict.fromkeys(names, value)
    return {name: torch.as_tensor(one) != 0 for name, one in given.items()}


def check_mask(
    mask: Any, batch: int, sequence: int, device: torch.device, per_token: bool = True
) -> Tensor | dict[str, Tensor]:
    """Check a caller's ``intervention_mask``: (batch, sequence), true where edits apply; or such by adapter name.

    Without ``per_token``, one of the batch's rows alone is checked: the site may hold another number of states a row.
    """
    if isinstance(mask, Mapping):
        return {name: _check_one_mask(value, batch, sequence, device, per_token) for name, value in mask.items()}
    return _check_one_mask(mask, batch, sequence, device, per_token)


def _check_one_mask(mask: Any, batch: int, sequence: int, device: torch.device, per_token: bool) -> Bool[Tensor, ...]:
    mask = torch.as_tensor(mask, device=device)
    shape = tuple(mask.shape)
    if shape != (batch, sequence) and (per_token or not shape or shape[0] != batch):
        raise ReftuneError(f"intervention_mask has shape {shape}, expected (batch, sequence) = {(batch, sequence)}.")
    return mask != 0


def _of_stack(plans: Mapping[str, PositionPlan | None], stack: str) -> PositionPlan | None:
    return plans.get(stack, plans.get("", NOTHING))


class Planner:
    """Makes the plan of every forward of one model.

    Args:
        model: the root module.
        active_positions: gives the positions of the adapters that edit now, by adapter.
    """

    def __init__(self, model: nn.Module, active_positions: Callable[[], dict[str, Positions]]):
        self.model = model
        self.active_positions = active_positions
        self._here = _UnderWay()
        self._awaiting: weakref.WeakSet[_Awaiting] = weakref.WeakSet()
        self._first_edited: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self.model, "active_positions": self.active_positions}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    # Forwards

    @property
    def in_forward(self) -> bool:
        """Whether a forward of the model is under way (otherwise a hook that runs belongs to a recomputation)."""
        return bool(self._here.calls)

    @property
    def row_adapters(self) -> list[str] | None:
        """In a batch of mixed adapters, the name of each row's."""
        return self._here.row_adapters

    @contextmanager
    def mixed(self, row_adapters: list[str]) -> Iterator[None]:
        """For the length of a ``with`` block, this thread's forwards edit every row by its own adapter."""
        before, self._here.row_adapters = self._here.row_adapters, row_adapters
        try:
            yield
        finally:
            self._here.row_adapters = before

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Begin a forward of the root, or of a stack that is called by itself: take our arguments out and plan.

        Returns:
            ``args`` and ``kwargs`` without ``CALL_ARGUMENTS``.

        Raises:
            ReftuneError: arguments that do not fit, or ``adapter_names``, which are PEFT's models' alone.
        """
        if kwargs.get("adapter_names") is not None:  # PEFT's own models take them out before
            raise ReftuneError(
                "adapter_names: a model with adapters of add_adapter edits every row by its active ones; for rows with "
                "adapters of their own, wrap the base in PEFT's model (get_peft_model, PeftModel.from_pretrained)."
            )
        call = _Call(module, torch.is_grad_enabled())
        self._here.calls.append(call)
        self._here.handed = None
        ours = {name: kwargs[name] for name in CALL_ARGUMENTS if kwargs.get(name) is not None}
        kwargs = {name: value for name, value in kwargs.items() if name not in CALL_ARGUMENTS}
        active = self.active_positions()
        ours["directions"] = by_adapter(ours.pop("intervention_directions", None), active)
        spans = spans_of(kwargs)
        if module is self.model and spans is None and not self._here.memories:
            self._check_one_name_a_row(bind(module, args, kwargs))
        if spans is not None:
            call.plans[""] = packed_plan(spans)
        elif active:
            arguments = bind(module, args, kwargs)
            for stack, role in self._roles(module).items():
                plan = call.plans[stack] = self._plan(module, arguments, role, active, **ours)
                if plan is not None:
                    plan.adapters = tuple(active)
        return args, kwargs

    def _check_one_name_a_row(self, arguments: Mapping[str, Any]) -> None:
        names = self._here.row_adapters
        if names is not None and (rows := batch_rows(arguments)) not in (None, len(names)):
            raise ReftuneError(f"adapter_names has {len(names)} names for {rows} rows: give one name a row.")

    def begins_running(self) -> bool:
        """Whether a call of the model is planned and its ``forward`` not yet called: from now on it was."""
        call = self._here.calls[-1] if self._here.calls else None
        if call is None or call.module is not self.model or call.running:
            return False
        call.running = True
        return True

    def leave(self, module: nn.Module, *_: Any) -> None:
        """End the forward that ``enter`` began for this module, whether it returned or raised."""
        calls = self._here.calls
        if calls and calls[-1].module is module:
            calls.pop()
            self._here.handed = None

    def plan_of(self, stack: str) -> PositionPlan | None:
        """The current forward's plan for a stack (one of another kind than the root's tokens gets the whole row)."""
        return _of_stack(self._here.calls[-1].plans if self._here.calls else {}, stack)

    def _roles(self, module: nn.Module) -> dict[str, Role]:
        if not is_encoder_decoder(self.model):
            return {"": "only"}
        if module is self.model:
            return {"encoder": "encoder", "decoder": "decoder"}
        return {"": "encoder"}  # transformers' generate runs the encoder by itself, once

    def _plan(
        self,
        module: nn.Module,
        arguments: dict[str, Any],
        role: Role,
        active: dict[str, Positions],
        prompt_lengths: Any = None,
        intervention_mask: Any = None,
        directions: dict[str, Tensor] | None = None,
    ) -> PositionPlan | None:
        memory = self._here.memories[-1] if self._here.memories else None
        if memory is not None and role != "encoder":
            found = token_arguments(arguments, role, module, needs_prompt=False)
            if found is None:
                return NOTHING
            size = found["batch"], found["sequence"], found["past_length"]
            return memory.plan(*size, active, found["device"], self.row_adapters)
        if memory is not None:
            intervention_mask = memory.encoder_mask
        keep_empty = module.training and torch.is_grad_enabled()
        masked = (
            intervention_mask
            if isinstance(intervention_mask, Mapping)
            else active
            if intervention_mask is not None
            else {}
        )
        needs_prompt = any(not positions.everywhere for name, positions in active.items() if name not in masked)
        settled = prompt_lengths is not None
        found = token_arguments(arguments, role, self.model, needs_prompt=needs_prompt and not settled)
        mask: Mask = None
        if intervention_mask is not None and role != "decoder":
            if found is not None:
                mask = check_mask(intervention_mask, found["batch"], found["sequence"], found["device"], False)
            else:  # its shape is the site's
                mask = by_adapter(intervention_mask, active)
            if isinstance(mask, Tensor) or set(mask) >= set(active):
                return PositionPlan(None, mask, keep_empty, self.row_adapters, directions)
        if found is None:
            padding = arguments.get("attention_mask")
            if needs_prompt and padding is not None and module is not self.model:
                raise ReftuneError(NO_TOKENS.format(kind=type(module).__name__))
            return PositionPlan(None, mask, keep_empty, self.row_adapters, directions)
        found["needs_prompt"] = needs_prompt
        if not needs_prompt and not is_token_mask(found["attention_mask"], found["batch"], found["sequence"]):
            found["attention_mask"] = None  # every state is edited: what it says of tokens does not matter
        layout = layout_of(**found, prompt_lengths=None if role == "encoder" else prompt_lengths)
        return PositionPlan(layout, mask, keep_empty, self.row_adapters, directions)

    # Recomputation in backward, in this thread or in one of autograd's own

    def hand(self, block: Any, plan: PositionPlan | None) -> None:
        """Note that a block was given its plan as a keyword argument, in a forward or in its recomputation."""
        if not torch.compiler.is_compiling():
            self._here.handed = block, plan

    def plan_at(self, block: Any, stack: str, is_handed: bool) -> PositionPlan | None:
        """The plan for an edit that runs now: of the forward under way, or of the one that is being recomputed.

        Args:
            block: the block it belongs to, as ``hand`` was told.
            stack: the block's stack.
            is_handed: whether every recomputation of this edit passes a hook that is given the plan.

        Raises:
            ReftuneError: a recomputation that is not given its plan, where more than one forward awaits its backward.
        """
        handed = self._here.handed
        has_plan = handed is not None and handed[0] is block
        if self._here.calls:
            if not is_handed and not has_plan:
                self._await_backward(self._here.calls[-1])
            return self.plan_of(stack)
        if has_plan:
            assert handed is not None
            return handed[1]
        own = self._here.awaiting
        waiting = [own] if own.forwards else [one for one in self._awaiting if one.forwards]
        for one in waiting:
            one.recomputed = True
        if sum(one.forwards for one in waiting) > 1:
            raise ReftuneError(TWO_FORWARDS)
        if not waiting and self.active_positions():
            raise ReftuneError(OUTSIDE)
        return _of_stack(waiting[0].plans, stack) if waiting else NOTHING

    def _await_backward(self, call: _Call) -> None:
        if call.counted or not call.with_grad or not checkpoints_activations(self.model):
            return
        call.counted = True
        own = self._here.awaiting
        self._awaiting.add(own)
        own.forwards = 1 if own.recomputed else own.forwards + 1
        own.recomputed, own.plans = False, call.plans

    # Generation

    def generate(
        self, *args: Any, intervention_mask: Any = None, intervention_directions: Any = None, **kwargs: Any
    ) -> Any:
        """Run the model's own ``generate``, remembering where the prompts end.

        Args:
            *args: as for ``transformers.GenerationMixin.generate``.
            intervention_mask: (batch, length), bool: the prompt tokens to edit, in place of the adapters' positions (of
                an encoder-decoder: the encoder's tokens); or such masks by adapter name.
            intervention_directions: (batch, r), bool: the directions of each edit that act on each row; or such by
                adapter name.
            **kwargs: as for ``transformers.GenerationMixin.generate``.

        Raises:
            ReftuneError: a cache was passed in which earlier turns edited tokens that can no longer be recomputed; not
                one of ``adapter_names`` for each prompt.
        """
        self._check_one_name_a_row({**kwargs, "inputs": args[0]} if args else kwargs)
        kind: Any = type(self.model)
        base_generate = kind.generate
        active = self.active_positions()
        if not active:
            return base_generate(self.model, *args, **kwargs)
        attended, past, device = generation_prompt(self.model, args, kwargs)
        memory = PromptMemory(attended.to(device), directions=by_adapter(intervention_directions, active))
        if intervention_mask is not None and is_encoder_decoder(self.model):
            memory.encoder_mask = intervention_mask
        elif intervention_mask is not None:
            rows, length = attended.shape
            memory.mask = check_mask(intervention_mask, rows, length, device)
        cache = kwargs.get("past_key_values")
        if past:
            self._rewind(cache, past, memory, active, args, kwargs)
        if self.model.training and checkpoints_activations(self.model):
            if kwargs.setdefault("use_cache", False) is False:
                logger.warning_once(CHECKPOINTED_GENERATION)
        self._here.memories.append(memory)
        try:
            result = base_generate(self.model, *args, **kwargs)
        finally:
            self._here.memories.pop()
        for kept in (cache, getattr(result, "past_key_values", None)):
            if kept is not None and memory.first_edited is not None:
                self._first_edited[kept] = memory.first_edited
        return result

    def _rewind(
        self, cache: Any, past: int, memory: PromptMemory, active: dict[str, Positions], args: Any, kwargs: Any
    ) -> None:
        """Crop a conversation's cache to the first token that an earlier turn edited or that this one edits."""
        memory.plan(memory.attended.shape[0], memory.attended.shape[1], 0, active, memory.attended.device)
        keep = min(
            past, self._first_edited.pop(cache, past), past if memory.first_edited is None else memory.first_edited
        )
        memory.first_edited = None
        if keep == past:
            return
        tokens = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs"))
        if tokens is None or tokens.shape[1] != memory.attended.shape[1] or not hasattr(cache, "crop"):
            raise ReftuneError(
                f"The cache passed to generate holds {past} tokens, but from token {keep} on they must be computed "
                "again: only the newest prompt is edited. Pass the whole conversation's input_ids with the cache, or "
                "no cache."
            )
        cache.crop(keep - past)
