"""The hooks behind ``intervene``: which units pass in this call, what replaces them, what was seen."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from reftune.causal.actions import Action, keep
from reftune.causal.locations import Location, Units, units
from reftune.engine.forwards import Role, bind, generation_prompt, is_encoder_decoder, token_arguments
from reftune.engine.hooks import CHANGING, edit_passing, hook_before
from reftune.engine.intervention import edit_rows
from reftune.engine.positions import TokenLayout, read_layout
from reftune.engine.sites import Site
from reftune.engine.stand_ins import DirectForward, OwnThread, StandIn
from reftune.errors import ReftuneError

_TURNS: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()


def _turn(model: nn.Module) -> threading.RLock:
    """Held by the thread whose sessions the model has: they nest, while those of two threads would not."""
    with CHANGING:
        return _TURNS.setdefault(model, threading.RLock())


class Stop(Exception):
    """Ends a forward from which nothing further is wanted."""


class Bound:
    """An intervention at its site in a model.

    Args:
        location, site: where.
        action: what.
        sources: what the action takes, (batch, n, ...) each; a batch of 1 serves every row.
        cell: in a session of several cells, the one to which it belongs; None: it works on the whole batch.
    """

    def __init__(
        self, location: Location, site: Site, action: Action, sources: Sequence[Tensor], cell: int | None = None
    ) -> None:
        self.location, self.site, self.action, self.sources = location, site, action, list(sources)
        self.cell = cell
        self.begin()

    def begin(self) -> None:
        """Forget the last forward."""
        self._seen: list[tuple[Units, Tensor]] = []
        self.calls = 0

    def apply(self, hidden: Tensor, layout: TokenLayout | None, past: int, beams: int) -> Tensor:
        """The tensor with this intervention in it."""
        call, self.calls = self.calls, self.calls + 1
        found = units(self.location, hidden, layout, call, past, prompt_only=bool(self.sources))
        if found is None:
            return hidden
        if self.action is keep:  # only read: no copy of the whole tensor
            self._seen.append((found, self._read(hidden, found)))
            return hidden
        return edit_rows(hidden, partial(self._edit, found, beams), found.rows, self.site.columns)

    def _read(self, hidden: Tensor, found: Units) -> Tensor:
        flat = hidden.reshape(-1, hidden.shape[-1])
        # A copy in any case: what passes here may be changed in place later on.
        states = flat.index_select(0, found.rows) if isinstance(found.rows, Tensor) else flat.clone()
        return states if self.site.columns is None else states[:, self.site.index]

    def _edit(self, found: Units, beams: int, states: Tensor) -> Tensor:
        self._seen.append((found, states))
        return self.action(states, *(self._aligned(source, found, beams) for source in self.sources))

    def _aligned(self, source: Tensor, found: Units, beams: int) -> Tensor:
        """One row of the source for each unit."""
        batch = len(found.counts)
        if source.shape[0] == 1 != batch:
            source = source.expand(batch, *source.shape[1:])
        source = source.repeat_interleave(beams, 0)
        if source.shape[0] != batch:
            raise ReftuneError(
                f"{self.location.component}: the source has a batch of {source.shape[0] // beams}, the base one of "
                f"{batch // beams}; every base row takes its own source row"
            )
        per_row = source.shape[1]
        if bool((found.counts != per_row).any()):
            row = int((found.counts != per_row).nonzero()[0])
            raise ReftuneError(
                f"{self.location.component}: the source has {per_row} positions a row, and the base row {row} has "
                f"{int(found.counts[row])}; name as many positions in both"
            )
        flat = source.flatten(0, 1)
        return flat if found.which is None else flat[found.which.to(flat.device)]

    def complete(self) -> bool:
        """Whether every unit of this location was seen."""
        if not self._seen:
            return False
        first = self._seen[0][0]
        if first.which is None:
            return True
        if self.location.positions is None or isinstance(self.location.positions, str):
            return False
        return sum(len(states) for _, states in self._seen) == int(first.counts.sum())

    def states(self) -> Tensor:
        """What was seen, (batch, n, width)."""
        if not self._seen:
            raise ReftuneError(f"{self.location} was not reached: {self.site.module_path!r} did not run")
        counts = self._seen[0][0].counts
        flat = torch.cat([states for _, states in self._seen])
        order = [which for found, _ in self._seen if (which := found.which) is not None]
        if len(order) == len(self._seen):
            ids = torch.cat(order)
            if self.location.positions in (None, "all"):  # calls: one after another, so batch comes second
                return flat.view(len(order), len(counts), -1).transpose(0, 1)
            flat = flat[ids.argsort()]
        if bool((counts != counts[0]).any()):
            raise ReftuneError(
                f"rows have {counts.tolist()} tokens at {self.location.positions!r}: give each row as many"
            )
        return flat.view(len(counts), -1, flat.shape[-1])


class _Generate(StandIn):
    """Stands in for ``model.generate`` while a session is open."""

    def __init__(self, session: Session) -> None:
        self.session = session
        super().__init__(session.model, "generate")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own ``generate``, with the prompt remembered: positions are the prompt's."""
        session = self.session
        if not session.thread.here:
            return self.original(*args, **kwargs)
        session.prompt = generation_prompt(session.model, args, kwargs)[0]
        try:
            return self.original(*args, **kwargs)
        finally:
            session.prompt = None


class Session:
    """All interventions on one model at a time; a context manager, within which the model is hooked.

    It acts on the forwards of the thread that made it. Another thread that enters one waits until this one is left.

    Args:
        model: the root module.
        bound: the interventions.
        cells: how many batches, one after another, make up the batch that runs.
    """

    def __init__(self, model: nn.Module, bound: Sequence[Bound], cells: int = 1) -> None:
        self.model, self.bound, self.cells = model, list(bound), cells
        self.stop_after: set[int] = set()
        self.thread = OwnThread()
        self.prompt: Tensor | None = None
        self._handles: list[Any] = []
        self._layouts: dict[str, tuple[TokenLayout, int]] = {}
        self._begun = False

    def __enter__(self) -> None:
        """Hook the model; **changes it** until the end of the ``with`` block."""
        _turn(self.model).acquire()
        self._handles.append(hook_before(self.model, self._enter))
        self._handles.append(self.model.register_forward_hook(self._leave, always_call=True))
        places: dict[tuple[str, str], list[int]] = {}
        for index, bound in enumerate(self.bound):
            places.setdefault((bound.site.module_path, bound.site.side), []).append(index)
        for members in places.values():
            site = self.bound[members[0]].site
            self._handles.append(edit_passing(self.model, site, partial(self._edit, members)))
        if hasattr(type(self.model), "generate"):
            self._handles.append(_Generate(self))
        self._handles.append(DirectForward(self.model, self._begins))

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        _turn(self.model).release()

    def _begins(self) -> bool:
        if not self.thread.here:
            return True
        begun, self._begun = self._begun or not self._handles, False
        return begun

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.thread.here:
            return
        for bound in self.bound:
            bound.begin()
        self._layouts, self._begun = {}, True
        roles: dict[str, Role] = {"": "only"}
        if is_encoder_decoder(self.model):
            roles = {"encoder": "encoder", "decoder": "decoder"}
        arguments = bind(module, args, kwargs)
        for stack, role in roles.items():
            # Whether a plain forward is a decoding step cannot be told here; only `_Generate` knows of prompts.
            found = token_arguments(arguments, role, module, needs_prompt=False)
            if found is None:
                continue
            past = found["past_length"]
            layout = read_layout(**found)
            length = self._prompt_length(layout, past, role)
            if length is None:  # labels say what is learned: they move no position
                length = past + layout.attended.sum(-1, keepdim=True)
            self._layouts[stack] = (TokenLayout(layout.attended, layout.ordinal, length), past)

    def _prompt_length(self, layout: TokenLayout, past: int, role: Role) -> Tensor | None:
        if self.prompt is None or role == "encoder":
            return None
        batch = layout.attended.shape[0]
        lengths = self.prompt.sum(-1, keepdim=True).to(layout.attended.device)
        return lengths.repeat_interleave(max(1, batch // lengths.shape[0]), 0)

    def _leave(self, *_: Any) -> None:
        if self.thread.here:
            self._layouts = {}

    def _edit(self, members: list[int], hidden: Tensor) -> Tensor:
        if not self.thread.here:
            return hidden
        whole = [self.bound[index] for index in members if self.bound[index].cell is None]
        in_cells = [self.bound[index] for index in members if self.bound[index].cell is not None]
        for bound in whole:
            hidden = self._apply(bound, hidden)
        if in_cells:
            parts = list(hidden.chunk(self.cells))
            for bound in in_cells:
                assert bound.cell is not None
                parts[bound.cell] = self._apply(bound, parts[bound.cell])
            hidden = torch.cat(parts)
        if self.stop_after and all(self.bound[index].complete() for index in self.stop_after):
            raise Stop
        return hidden

    def _apply(self, bound: Bound, hidden: Tensor) -> Tensor:
        stack = bound.site.stack.name if bound.site.stack else ""
        layout, past = self._layouts.get(stack, self._layouts.get("", (None, 0)))
        beams = 1
        if self.prompt is not None and layout is not None:
            beams = max(1, layout.attended.shape[0] // self.prompt.shape[0])
        if bound.cell is not None and layout is not None:
            assert layout.prompt_length is not None
            parts = (layout.attended, layout.ordinal, layout.prompt_length)
            layout = TokenLayout(*(part.chunk(self.cells)[bound.cell] for part in parts))
        return bound.apply(hidden, layout, past, beams)
