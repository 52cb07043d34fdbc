"""Where an intervention reads or writes: a component of a layer, at some tokens or time steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from reftune.engine.position_grammar import parse_positions
from reftune.engine.position_plan import EVERY_ROW, Rows
from reftune.engine.positions import TokenLayout
from reftune.engine.sites import Layers, Site, find_sites, find_stacks, resolve_layers
from reftune.errors import ReftuneError

Indices = int | Sequence[int] | Sequence[Sequence[int]] | Tensor | str | None


@dataclass(frozen=True, eq=False)
class Location:
    """A component of a layer, at some positions.

    Attributes:
        component: as in ``reftune.engine.sites``: ``"block_output"``, ``"head_output[3]"``, a module path of any
            ``nn.Module``.
        layer: the block's number; None for a module path without ``{layer}``.
        positions: which tokens. An index counts the attended tokens of a row (padding never counts), from the end if
            negative; a list names several for every row; (batch,) or (batch, n) gives each row its own. A string is
            read as for an adapter (``"l1"``, ``"f3+l2"``, ``"prompt"``, ``"all"``). None is ``"all"``.
            Where a module sees no tokens but is called once a time step (a GRU cell), positions count its calls.
    """

    component: str = "block_output"
    layer: int | None = None
    positions: Indices = None

    def __post_init__(self) -> None:
        if isinstance(self.positions, str):
            parse_positions(self.positions)
        elif self.positions is not None:
            self.indices(1, torch.device("cpu"), check=False)

    def at(self, positions: Indices) -> Location:
        """The same component at other positions."""
        return replace(self, positions=positions)

    def site(self, model: nn.Module) -> Site:
        """The site in a model.

        Raises:
            ReftuneError: there is none, or (a module path with ``{layer}``, without a layer) more than one.
        """
        layers = "all" if self.layer is None else self.layer
        try:
            sites = find_sites(model, self.component, layers)
        except ReftuneError:
            if (site := self._plain_site(model)) is None:
                raise
            return site
        if len(sites) > 1:
            raise ReftuneError(f"component={self.component!r} is in {len(sites)} layers: give Location(layer=...)")
        return sites[0]

    def _plain_site(self, model: nn.Module) -> Site | None:
        """A module outside all blocks whose width its type does not tell: known when it runs, 0 until then."""
        path, _, side = self.component.partition(":")
        path = path.replace("{layer}", str(self.layer))
        known = dict(model.named_modules()).get(path) if path else None
        if known is None or isinstance(known, nn.ModuleList | nn.ModuleDict) or find_stacks(model):
            return None
        return Site(self.component, self.layer, path, path, "input" if side == "input" else "output", 0, None, 0, None)

    def indices(self, batch: int, device: torch.device, check: bool = True) -> Int[Tensor, "batch n"]:
        """Explicit positions as one row of indices for each row of the batch."""
        found = torch.as_tensor(self.positions, device=device)
        if found.dtype not in (torch.int64, torch.int32) or found.ndim > 2 or found.numel() == 0:
            raise ReftuneError(f"positions={self.positions!r}: give an index, a list of them, or (batch, n) indices")
        if found.ndim == 0:
            return found.view(1, 1).expand(batch, 1).long()
        if found.ndim == 1:
            own = isinstance(self.positions, Tensor)
            if not own:
                return found.expand(batch, -1).long()
            found = found[:, None]
        if check and batch % found.shape[0]:
            raise ReftuneError(f"positions are given for {found.shape[0]} rows, and the batch has {batch}")
        return found.repeat_interleave(max(1, batch // found.shape[0]), 0).long()


def layers_of(model: nn.Module, component: str, layers: Layers = "all") -> list[int | None]:
    """The numbers of the layers that have a component (None where it names one module and no layer).

    Raises:
        ReftuneError: there is none.
    """
    try:
        return [site.layer for site in find_sites(model, component, layers)]
    except ReftuneError:
        head, found, _ = component.partition("{layer}")
        if not found and Location(component)._plain_site(model) is not None:
            return [None]
        blocks = dict(model.named_modules()).get(head.removesuffix("."))
        if not found or not isinstance(blocks, nn.ModuleList | nn.Sequential) or find_stacks(model):
            raise
        return list(resolve_layers(layers, len(blocks)))


class Sites:
    """The sites of locations in one model, each component of a layer looked up once.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._known: dict[tuple[str, int | None], Site] = {}

    def __call__(self, location: Location) -> Site:
        """A location's site."""
        key = location.component, location.layer
        if key not in self._known:
            self._known[key] = location.site(self._model)
        return self._known[key]


class Units(NamedTuple):
    """The units of a location that one call of its module holds.

    Attributes:
        rows: their places in the tensor flattened to (tokens, width).
        which: their numbers among all units of the location, counted row by row; None means all of them, in order.
        counts: how many units each row of the batch has in all, (batch,).
    """

    rows: Rows
    which: Int[Tensor, " units"] | None
    counts: Int[Tensor, " batch"]


def units(
    location: Location,
    hidden: Float[Tensor, "*leading width"],
    layout: TokenLayout | None,
    call: int,
    past: int,
    prompt_only: bool,
) -> Units | None:
    """Find a location's units in a tensor that passes its module; None if this call holds none of them.

    Args:
        location: where.
        hidden: the tensor.
        layout: the forward's tokens; None where it has none (then the tensor's own dimensions tell).
        call: how many times the module was called in this forward before.
        past: tokens already in a key-value cache.
        prompt_only: leave generated tokens out where positions are ``"all"``.

    Raises:
        ReftuneError: a position past the end.
    """
    tokens = hidden.numel() // hidden.shape[-1]
    if layout is not None and layout.attended.numel() != tokens:
        if hidden.ndim != 2 or hidden.shape[0] != layout.attended.shape[0]:
            shape = tuple(layout.attended.shape)
            raise ReftuneError(f"{location.component}: the forward has {shape} tokens, but {tokens} pass here")
        layout = None
    if layout is None and hidden.ndim == 2:
        return _call_units(location, hidden, call)
    if layout is None:
        if hidden.ndim != 3:
            raise ReftuneError(f"{location.component}: a tensor of shape {tuple(hidden.shape)} passes here, not tokens")
        attended = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        total = attended.sum(-1, keepdim=True)
        layout = TokenLayout(attended, attended.cumsum(-1) - 1, total)
    if location.positions is None or isinstance(location.positions, str):
        return _selected_units(parse_positions(location.positions or "all"), layout, past, prompt_only)
    return _indexed_units(location, layout, past)


def _call_units(location: Location, hidden: Tensor, call: int) -> Units | None:
    batch, device = hidden.shape[0], hidden.device
    if location.positions is None or location.positions == "all":
        return Units(EVERY_ROW, torch.arange(batch, device=device) + call * batch, torch.ones(batch).long())
    if isinstance(location.positions, str):
        raise ReftuneError(
            f"positions={location.positions!r}: {location.component!r} sees no tokens; give call numbers"
        )
    wanted = location.indices(batch, device)
    if bool((wanted < 0).any()):
        raise ReftuneError(f"positions={location.positions!r}: calls of {location.component!r} count from the start")
    which = (wanted == call).flatten().nonzero().squeeze(-1)
    if not len(which):
        return None
    counts = torch.full((batch,), wanted.shape[1])
    return Units(torch.div(which, wanted.shape[1], rounding_mode="floor"), which, counts)


def _selected_units(positions: object, layout: TokenLayout, past: int, prompt_only: bool) -> Units | None:
    selected: Bool[Tensor, "batch sequence"] = layout.selected(positions)  # pyright: ignore[reportArgumentType]
    if prompt_only and layout.prompt_length is not None:
        selected = selected & (layout.ordinal < layout.prompt_length)
    if past and prompt_only:
        return None
    rows = selected.flatten().nonzero().squeeze(-1)
    return Units(rows, None, selected.sum(-1).cpu()) if len(rows) else None


def _indexed_units(location: Location, layout: TokenLayout, past: int) -> Units | None:
    batch, sequence = layout.attended.shape
    wanted = location.indices(batch, layout.attended.device)
    length = layout.prompt_length
    assert length is not None
    absolute = torch.where(wanted < 0, wanted + length, wanted)
    if bool(((absolute < 0) | (absolute >= length)).any()):
        row, which = ((absolute < 0) | (absolute >= length)).nonzero()[0].tolist()
        raise ReftuneError(
            f"position {int(wanted[row, which])} is past the end: row {row} has {int(length[row])} tokens"
        )
    found = (layout.ordinal[:, None, :] == absolute[:, :, None]) & layout.attended[:, None, :]
    present = found.any(-1)
    columns = found.int().argmax(-1)
    rows = (columns + torch.arange(batch, device=columns.device)[:, None] * sequence).flatten()
    counts = torch.full((batch,), wanted.shape[1])
    if bool(present.all()):
        return Units(rows, None, counts)
    which = present.flatten().nonzero().squeeze(-1)
    return Units(rows[which], which, counts) if len(which) else None
