"""A bank's edits on a model: hooks that apply them to the rows of packed batches, and nothing to any other forward."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from reftune.engine.hooks import Engine, edit_passing, hook_before
from reftune.engine.packed import packed_runs, spans_of
from reftune.engine.row_plan import Run
from reftune.engine.sites import Site, find_sites
from reftune.errors import ReftuneError
from reftune.serving.bank import Bank
from reftune.serving.folded import FoldedAdapter


class _UnderWay(threading.local):
    """The edited rows of this thread's forward: one list for the requests' first adapters, one for their second..."""

    orders: tuple[list[Run], ...] | list[list[Run]] = ()


class PackedEdits:
    """Lets a bank's adapters edit packed forwards; **adds hooks to the model** as adapters are read, until ``remove``.

    Args:
        model: the base model, without edits of its own.
        bank: the adapters; each is checked against the model when it is read.

    Raises:
        ReftuneError: a model that carries edits already.
    """

    def __init__(self, model: nn.Module, bank: Bank):
        if Engine.of(model) is not None:
            raise ReftuneError(
                "This model carries edits already; a bank needs the base model alone (unload() gives it)."
            )
        self.model, self.bank = model, bank
        self._here = _UnderWay()
        self._sites: dict[tuple[str, str], dict[str, Site]] = {}
        self._hooked: set[tuple[str, str]] = set()
        self._handles: list[Any] = [
            hook_before(model, self._enter),
            model.register_forward_hook(self._leave, always_call=True),
        ]
        bank.check = self.check

    def remove(self) -> None:
        """Take the hooks away; the model is the base again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._hooked.clear()
        self.bank.check = None

    def check(self, adapter: FoldedAdapter) -> None:
        """Make sure that an adapter fits the model, and that its places are hooked.

        Raises:
            ReftuneError: a component, layer or width that this model does not have.
        """
        asked = adapter.component, repr(adapter.layers)
        if asked not in self._sites:
            found = find_sites(self.model, adapter.component, adapter.layers)
            self._sites[asked] = {site.block_path: site for site in found}
        sites = self._sites[asked]
        check_fits(adapter, sites)
        for block, site in sites.items():
            if (adapter.component, block) not in self._hooked:
                self._hooked.add((adapter.component, block))
                edit = partial(self._edit, (adapter.component, block), site.index)
                self._handles.append(edit_passing(self.model, site, edit))

    def _enter(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        spans = spans_of(kwargs)
        self._here.orders = packed_runs(spans) if spans else ()

    def _leave(self, *_: Any) -> None:
        self._here.orders = ()

    def _edit(self, site: tuple[str, str], columns: slice | list[int] | None, hidden: Tensor) -> Tensor:
        for runs in self._here.orders:
            hidden = self.bank.edit(site, hidden, runs, columns)
        return hidden


def check_fits(adapter: FoldedAdapter, sites: Mapping[str, Site]) -> None:
    """Make sure that an adapter has one edit for each site, of its width.

    Args:
        adapter: the adapter.
        sites: those of its component and layers on the model, by block path.

    Raises:
        ReftuneError: an adapter that was trained on another base model.
    """
    for edit in adapter.edits:
        site = sites.get(edit.block)
        if site is None or site.width != edit.width:
            has = "no such place" if site is None else f"{site.width} channels there"
            raise ReftuneError(
                f"{adapter.folder}: an edit of {edit.width} channels at {edit.block or 'the model'}, where this "
                f"model has {has}: it was trained on another base model ({adapter.base!r})."
            )
    if missing := sites.keys() - {edit.block for edit in adapter.edits}:
        raise ReftuneError(
            f"{adapter.folder}: no edit for {sorted(missing)[0]}: it was trained on another base model "
            f"({adapter.base!r})."
        )
