"""`generate(adapter_names=...)` for users of a store: a bank's edits in ordinary forwards, each row by its own user.

::

    with attach_store(model, "users"):
        model.generate(**inputs, adapter_names=["anna", "bob", "__base__"])
        model(**inputs, adapter_names=["bob", "anna", "anna"]).logits

All users of a store edit the same sites at the same positions, so one placement serves all of them: the engine finds
the rows as for any adapter, and the bank edits each by its owner's row of the stacks. A user has no module.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from reftune.engine.attach import Attachment
from reftune.engine.hooks import BASE_ROW, CHANGING, Engine
from reftune.engine.intervention import Intervention, Placement
from reftune.engine.planning import Planner
from reftune.engine.position_grammar import parse_positions
from reftune.engine.position_plan import PositionPlan
from reftune.engine.positions import Part
from reftune.engine.row_plan import Run
from reftune.engine.sites import find_sites
from reftune.errors import ReftuneError
from reftune.serving.bank import Bank, Held
from reftune.serving.packed_edits import check_fits
from reftune.users.names import check_user_name
from reftune.users.store import UserStore

USERS = "users"
"""The name under which the engine knows the users of a store together."""


def attach_store(model: nn.Module, store: UserStore | str | Path, max_bytes: int = 1 << 28) -> Attachment:
    """Let ``generate`` and forwards of a model take users of a store; **changes the model** until ``detach``.

    Args:
        model: the base model alone, for inference.
        store: the store, or its folder; who is added or replaced while it is attached is seen.
        max_bytes: of edits to keep in memory; others are read when they are asked for.

    Returns:
        The attachment, a context manager. Without ``adapter_names`` the model is the base.

    Raises:
        ReftuneError: no store; a model that carries edits, or that the store's users do not fit.
    """
    store = store if isinstance(store, UserStore) else UserStore.open(store)
    with CHANGING:
        if Engine.of(model) is not None:
            raise ReftuneError("This model carries edits already; a store needs the base model alone (unload()).")
        return Attachment(_UserEngine(model, store, max_bytes), USERS)


class _UserEngine(Engine):
    """An engine with one adapter, whose rows are the users'."""

    def __init__(self, model: nn.Module, store: UserStore, max_bytes: int):
        super().__init__(model, lambda block: _UserIntervention())
        self.bank, config = Bank(max_bytes), store.config
        self.planner = _UserPlanner(model, self.active_positions, self.bank, store)
        positions = parse_positions(config["positions"])
        untied = not config["share_weights"] and positions.has_two_ends
        sites = find_sites(model, config["component"], config["layers_to_transform"])
        self.bank.check = lambda adapter: check_fits(adapter, {site.block_path: site for site in sites})
        for site in sites:
            self.place(USERS, Placement(site, positions), nn.Identity(), nn.Identity() if untied else None)
        self.refresh()


class _Here(threading.local):
    """One thread's calls: the users of the rows, the forwards that named them, and the runs found last."""

    def __init__(self) -> None:
        self.held: list[Held | None] = []
        self.opened: list[tuple[nn.Module, ExitStack]] = []
        self.found: tuple[Any, ...] = (None,)


class _UserPlanner(Planner):
    """Takes ``adapter_names`` of each call; the engine sees which rows are edited, the bank sees by whom."""

    def __init__(self, model: nn.Module, active_positions: Any, bank: Bank, store: UserStore):
        super().__init__(model, active_positions)
        self.own, self._bank, self._store = _Here(), bank, store

    def generate(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """The model's ``generate``, with a user for each prompt (``"__base__"``: none); None: the base for all."""
        with self._by(adapter_names):
            return super().generate(*args, **kwargs)

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """As for ``Planner``, with ``adapter_names`` as in ``generate``."""
        names = kwargs.get("adapter_names")
        if names is None:
            return super().enter(module, args, kwargs)
        with ExitStack() as stack:
            stack.enter_context(self._by(names))
            entered = super().enter(module, args, {k: value for k, value in kwargs.items() if k != "adapter_names"})
            self.own.opened.append((module, stack.pop_all()))
        return entered

    def leave(self, module: nn.Module, *_: Any) -> None:
        """As for ``Planner``."""
        super().leave(module)
        if self.own.opened and self.own.opened[-1][0] is module:
            self.own.opened.pop()[1].close()

    @contextmanager
    def _by(self, names: Sequence[str] | None) -> Iterator[None]:
        if names is None:
            yield
            return
        if isinstance(names, str):
            raise ReftuneError(f"adapter_names={names!r}: give a list with one name for each row.")
        before = self.own.held
        with ExitStack() as stack:
            held: dict[str, Held | None] = {BASE_ROW: None}
            for name in names:
                if name not in held:
                    self._bank.add(check_user_name(name), self._store.path / name)
                    held[name] = stack.enter_context(self._bank.holding(name))
            stack.enter_context(self.mixed([BASE_ROW if name == BASE_ROW else USERS for name in names]))
            try:
                self.own.held = [held[name] for name in names]
                yield
            finally:
                self.own.held, self.own.found = before, (None,)


class _UserIntervention(Intervention):
    """A block's place for the users' edits, which are the bank's."""

    engine: _UserEngine

    def apply_at(
        self, module_path: str, side: str, hidden: Float[Tensor, " ..."], plan: PositionPlan | None
    ) -> Float[Tensor, " ..."]:
        """As for ``Intervention``, each row by its own user."""
        placement = self.placements.get(USERS)
        if plan is None or placement is None or USERS not in self.active_names(plan.row_adapters):
            return hidden
        site = placement.site
        if (site.module_path, site.side) != (module_path, side):
            return hidden
        for part, _ in self.parts(USERS):
            runs = self._runs(plan, placement, part, hidden)
            hidden = self.engine.bank.edit((site.component, site.block_path), hidden, runs, site.index)
        return hidden

    def _runs(self, plan: PositionPlan, placement: Placement, part: Part, hidden: Tensor) -> list[Run]:
        """The edited rows, by user; found once a forward."""
        own, tokens = self.engine.planner.own, hidden.shape[:-1].numel()
        if own.found[0] is not plan or own.found[1:3] != (part, tokens):
            rows = plan.rows(placement.positions, part, hidden, USERS)
            if isinstance(rows, Tensor) and rows.dtype == torch.bool:
                raise ReftuneError("Users of a store do not edit under torch.compile: export them, or do not compile.")
            each, runs = tokens // len(own.held), []
            for row in () if rows is None else rows.tolist() if isinstance(rows, Tensor) else range(tokens):
                held = own.held[row // each]
                if runs and runs[-1].stop == row and runs[-1].adapter is held:
                    runs[-1] = runs[-1]._replace(stop=row + 1)
                else:
                    runs.append(Run(row, row + 1, held, part))
            own.found = (plan, part, tokens, runs)
        return own.found[3]
