"""The child module that a block carries: its adapters' edits, and their application to a hidden state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from reftune.edits import Edit
from reftune.engine.position_grammar import Positions
from reftune.engine.position_plan import PositionPlan, Rows
from reftune.engine.positions import Part
from reftune.engine.sites import Site
from reftune.errors import ReftuneError


@dataclass
class Placement:
    """Where and when one adapter edits inside a block.

    Attributes:
        site: the hooked module and the channels the edit sees.
        positions: the tokens it touches.
        scale: factor on what the edit adds (1: as trained).
    """

    site: Site
    positions: Positions
    scale: float = 1.0


class Intervention(nn.Module):
    """The adapters' edits at one block, found there as ``block.intervention``.

    It changes no module path, and the engine's hooks call ``apply_at``; called itself, as a block that is an
    ``nn.Sequential`` calls all that it holds, it is the identity. The containers are named
    and nested as they are because PEFT finds, renames and deletes adapters by these names: every parameter is
    ``intervention.reft_edits.<adapter>.<tensor>`` (``reft_suffix_edits`` for the second edit of an untied pair).
    """

    adapter_layer_names: tuple[str, ...] = ("reft_edits", "reft_suffix_edits")

    def __init__(self) -> None:
        super().__init__()
        self.reft_edits = nn.ModuleDict()
        self.reft_suffix_edits = nn.ModuleDict()
        self.placements: dict[str, Placement] = {}
        self.engine: Any = None
        self.paused: set[str] = set()
        self.is_handed = True
        self._active_adapter: str | list[str] = []
        self._disable_adapters = False

    def forward(self, hidden: Any) -> Any:
        """The identity."""
        return hidden

    def active_names(self, row_adapters: Sequence[str] | None = None) -> list[str]:
        """Names of the adapters that edit here now, in order.

        Args:
            row_adapters: in a batch of mixed adapters, each row's.
        """
        if self._disable_adapters:
            return []
        if row_adapters is not None:
            return [name for name in dict.fromkeys(row_adapters) if name in self.placements]
        names = [self._active_adapter] if isinstance(self._active_adapter, str) else self._active_adapter
        return [name for name in names if name in self.placements and name not in self.paused]

    def add(self, name: str, placement: Placement, edit: nn.Module, suffix_edit: nn.Module | None = None) -> None:
        """Register an adapter's edit here; **changes this module**.

        Args:
            name: the adapter's name (no dots).
            placement: where and when it edits.
            edit: the edit, or the prefix's edit of an untied pair.
            suffix_edit: the suffix's edit of an untied pair.
        """
        self.placements[name] = placement
        self.reft_edits[name] = edit
        if suffix_edit is not None:
            self.reft_suffix_edits[name] = suffix_edit

    def remove(self, name: str) -> None:
        """Forget an adapter; **changes this module**."""
        self.placements.pop(name, None)
        for container in (self.reft_edits, self.reft_suffix_edits):
            if name in container:
                del container[name]

    def activate(self, name: str) -> None:
        """Let an adapter edit after those that already do; **changes this module**."""
        self._active_adapter = [*self.active_names(), name]

    def parts(self, name: str) -> list[tuple[Part, nn.Module]]:
        """An adapter's edits here, each with the half of the positions that it serves."""
        if name in self.reft_suffix_edits:
            return [("prefix", self.reft_edits[name]), ("suffix", self.reft_suffix_edits[name])]
        return [("both", self.reft_edits[name])]

    def apply_at(
        self, module_path: str, side: str, hidden: Float[Tensor, " ..."], plan: PositionPlan | None
    ) -> Float[Tensor, " ..."]:
        """Edit a hidden state passing (module_path, side), at the rows of a forward's plan.

        Args:
            module_path: the hooked place.
            side: of that module, ``"input"`` or ``"output"``.
            hidden: (..., channels); its leading dimensions hold batch * sequence tokens.
            plan: what the forward edits.

        Returns:
            The edited tensor, of the same shape, dtype and device; the very same tensor when nothing is edited.
        """
        if plan is None:  # NOTHING
            return hidden
        for name in self.active_names(plan.row_adapters):
            if plan.adapters is not None and name not in plan.adapters:  # attached since the forward began
                continue
            try:
                placement, parts = self.placements[name], self.parts(name)
            except KeyError:  # detached since, by another thread
                continue
            if placement.site.module_path != module_path or placement.site.side != side:
                continue
            _check_channels(placement.site, hidden)
            for part, edit in parts:
                rows = plan.rows(placement.positions, part, hidden, name)
                if rows is not None:
                    directions = plan.directions(rows, hidden, name)
                    hidden = edit_rows(hidden, edit, rows, placement.site.columns, placement.scale, directions)
        return hidden


def _check_channels(site: Site, hidden: Tensor) -> None:
    """Refuse states whose last dimension is not the site's channels (an image's maps have theirs second).

    Raises:
        ReftuneError: such states.
    """
    width, shape = site.channels, hidden.shape
    if shape[-1] != width or (len(shape) == 4 and shape[1] == width):
        raise ReftuneError(
            f"component={site.component!r}: states of shape {tuple(shape)} pass the {site.side} of "
            f"{site.module_path!r}, where (..., {width}) was expected: name a module whose {site.side} ends in its "
            "channels."
        )


def edit_rows(
    hidden: Float[Tensor, " ..."],
    edit: Callable[[Tensor], Tensor],
    rows: Rows,
    columns: range | tuple[int, ...] | None = None,
    scale: float = 1.0,
    directions: Float[Tensor, "rows r"] | None = None,
) -> Float[Tensor, " ..."]:
    """Gather rows, edit them, and put them back; every other row keeps its bits.

    Args:
        hidden: (..., channels).
        edit: maps (rows, width) to (rows, width).
        rows: flat token indices, or a bool for each token, or ``EVERY_ROW``.
        columns: the channels that the edit sees; None: all.
        scale: factor on what the edit adds.
        directions: 1 or 0 for each of the edit's r directions on each row; None: all act.

    Raises:
        ReftuneError: the edit changed the shape, or was given directions that it does not have.
    """
    flat = hidden.reshape(-1, hidden.shape[-1])
    chosen = rows.unsqueeze(-1) if isinstance(rows, Tensor) and rows.dtype == torch.bool else None
    if chosen is not None:
        before = torch.where(chosen, flat, 0)  # what padding holds must not reach the edit's gradients
    else:
        before = flat.index_select(0, rows) if isinstance(rows, Tensor) else flat
    index = None if columns is None else torch.tensor(columns, device=hidden.device)
    seen = before if index is None else before.index_select(-1, index)
    after = edit(seen) if directions is None else _edit_along(edit, seen, directions)
    if after.shape != seen.shape:
        raise ReftuneError(f"An edit returned shape {tuple(after.shape)} for an input of shape {tuple(seen.shape)}.")
    if scale != 1.0:
        after = seen + scale * (after - seen)
    after = after.to(before.dtype)
    if index is not None:
        after = before.index_copy(-1, index, after)
    if chosen is not None:
        return torch.where(chosen, after, flat).view_as(hidden)
    return (flat.index_copy(0, rows, after) if isinstance(rows, Tensor) else after).view_as(hidden)


def _edit_along(edit: Any, seen: Tensor, directions: Tensor) -> Tensor:
    r = getattr(edit, "r", None)
    if not isinstance(edit, Edit) or directions.shape[-1] != r:
        raise ReftuneError(
            f"intervention_directions are {directions.shape[-1]} a row; {type(edit).__name__} at this site has "
            f"{'none to choose from' if r is None else f'r={r}'}."
        )
    return edit(seen, directions)
