"""Many adapters' edits as stacked tensors, loaded when they are first asked for and kept within a budget.

::

    bank = Bank()
    bank.add("poet", "adapters/poet")            # reads nothing yet
    held = bank.take("poet", scale=0.5)          # a request begins: the adapter is read, and stays as it is
    held.ranges(prompt_length)                   # for the row plan
    hidden = bank.edit(site, hidden, runs)       # at a site of a forward: the rows of every adapter at once
    bank.give_back(held)                         # the request has ended

A site is ``(component, block path)``; each has one stack, of which row 0 edits nothing. A folder that has changed on
disk is read again for the next request; a request in flight keeps what it began with. What requests hold is never
thrown out, so the budget is passed for as long as they hold more than it allows.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from reftune.adapter.checkpoint import CONFIG_FILE, WEIGHTS_FILE
from reftune.edits import FoldedEdit
from reftune.edits.base import compute_dtype, without_autocast
from reftune.engine.positions import Part
from reftune.engine.row_plan import EditedRange, Run, edited_ranges
from reftune.errors import ReftuneError
from reftune.serving.folded import FoldedAdapter, read_folded
from reftune.users.store import user_of

logger = logging.getLogger(__name__)
Site = tuple[str, str]
"""Component and block path."""
_FEW_ROWS = 4
"""Up to so many rows a run, one batched product over gathered factors is faster than a product a run."""


@dataclass(eq=False)
class Loaded:
    """One version of an adapter in a bank.

    Attributes:
        adapter: as it was read.
        rows: its row in the stack of each of its sites, by site and part.
        modules: the edits that have no folded form, likewise.
        signature: of the files it was read from.
        requests: how many hold it.
    """

    adapter: FoldedAdapter
    signature: tuple[int, ...]
    rows: dict[tuple[Site, Part], int] = field(default_factory=dict)
    modules: dict[tuple[Site, Part], nn.Module] = field(default_factory=dict)
    requests: int = 0
    wanted: bool = True


@dataclass(frozen=True, eq=False)
class Held:
    """An adapter as one request has it: a version of its weights, and its strength.

    Attributes:
        loaded: the version.
        scale: factor on what its edits add.
    """

    loaded: Loaded
    scale: float = 1.0

    @property
    def key(self) -> str:
        """What a cache key names beside the edited ordinals: equal keys are equal edits."""
        return f"{self.loaded.adapter.digest}*{self.scale!r}"

    def ranges(self, prompt_length: int) -> tuple[EditedRange, ...]:
        """The edited ordinals of a request whose prompt has so many tokens."""
        return edited_ranges(self.loaded.adapter.positions, prompt_length, self.loaded.adapter.untied)


class Stack:
    """The folded edits of one site, side by side; of lower rank, padded with zeros. Row 0 edits nothing.

    Attributes:
        A: (rows, width, r).
        b: (rows, r).
        B: (rows, r, width).
    """

    def __init__(self, width: int):
        self.width = width
        self._free: list[int] = []
        self.factors = torch.zeros(1, width, 0), torch.zeros(1, 0), torch.zeros(1, 0, width)

    def put(self, edit: FoldedEdit) -> int:
        """Store an edit; **grows the stack** where there is no free row.

        Returns:
            Its row.
        """
        rows, _, rank = self.factors[0].shape
        r = edit.b.shape[0]
        if not self._free or r > rank:
            grown = rows if self._free else rows + max(7, rows // 2)
            self._free += range(rows, grown)
            self._grow(grown, max(r, rank))
        row = self._free.pop()
        A, b, B = self.factors
        for stacked in self.factors:
            stacked[row].zero_()
        A[row, :, :r], b[row, :r], B[row, :r] = edit.A, edit.b, edit.B
        if A.device.type != "cpu":
            torch.get_device_module(A.device).synchronize(A.device)  # forwards run on other streams
        return row

    def drop(self, row: int) -> None:
        """Give a row back."""
        self._free.append(row)

    def at(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """The factors on a device; **moves the stack** there at its first use."""
        if self.factors[0].device != device:
            A, b, B = self.factors
            self.factors = A.to(device), b.to(device), B.to(device)
        return self.factors

    def _grow(self, rows: int, rank: int) -> None:
        # New tensors, put in place at once: a forward under way goes on with the old ones, which hold all its rows.
        A, b, B = self.factors
        old, r = b.shape
        grown = A.new_zeros(rows, self.width, rank), b.new_zeros(rows, rank), B.new_zeros(rows, rank, self.width)
        grown[0][:old, :, :r], grown[1][:old, :r], grown[2][:old, :r] = A, b, B
        self.factors = grown


class Bank:
    """Adapters by name, read when first used; safe to use from many threads.

    Args:
        max_bytes: of folded edits to keep.
        max_adapters: to keep; None: as many as the bytes allow.
        check: called with every adapter that is read, to refuse what does not fit the base model.

    Attributes:
        stacks: by site.
        loads: how often a folder was read.
        evictions: how often an adapter was thrown out for room.
    """

    def __init__(
        self,
        max_bytes: int = 1 << 28,
        max_adapters: int | None = None,
        check: Callable[[FoldedAdapter], None] | None = None,
    ):
        self.max_bytes, self.max_adapters, self.check = max_bytes, max_adapters, check
        self.stacks: dict[Site, Stack] = {}
        self.loads = self.evictions = 0
        self._folders: dict[str, Path] = {}
        self._loaded: OrderedDict[str, Loaded] = OrderedDict()
        self._bytes = 0
        self._lock = threading.RLock()

    # Names

    def add(self, name: str, folder: str | Path) -> None:
        """Make a folder known under a name, in place of what had that name; nothing is read."""
        with self._lock:
            self._folders[name] = Path(folder).expanduser()

    def remove(self, name: str) -> None:
        """Forget a name; requests that hold its adapter keep it."""
        with self._lock:
            self._folders.pop(name, None)
            self._let_go(name)

    def names(self) -> list[str]:
        """The names known, in the order added."""
        return list(self._folders)

    @property
    def nbytes(self) -> int:
        """Bytes of the folded edits kept."""
        return self._bytes

    @property
    def loaded(self) -> list[str]:
        """The names whose adapters are in memory, the least recently used first."""
        return list(self._loaded)

    # Requests

    def take(self, name: str, scale: float = 1.0) -> Held:
        """Hold an adapter for a request; **reads its folder** where it is not in memory, or has changed.

        Raises:
            ReftuneError: an unknown name, or a folder that cannot be read, or whose adapter does not fit.
        """
        with self._lock:
            if name not in self._folders:
                raise ReftuneError(f"adapter {name!r} is not in the bank.")
            found = self._current(name)
            self._loaded.move_to_end(name)
            found.requests += 1
            self._make_room()
            return Held(found, float(scale))

    def give_back(self, held: Held) -> None:
        """End what ``take`` began; once for each."""
        with self._lock:
            held.loaded.requests -= 1
            if not held.loaded.wanted and not held.loaded.requests:
                self._free(held.loaded)
            self._make_room()

    @contextmanager
    def holding(self, name: str, scale: float = 1.0) -> Iterator[Held]:
        """``take`` and ``give_back`` around a ``with`` block."""
        held = self.take(name, scale)
        try:
            yield held
        finally:
            self.give_back(held)

    def _current(self, name: str) -> Loaded:
        folder, found = self._folders[name], self._loaded.get(name)
        signature = _signature(folder)
        if found is not None and found.signature == signature and found.adapter.folder == folder:
            return found
        try:
            adapter = read_folded(folder)
            if self.check is not None:
                self.check(adapter)
        except ReftuneError as error:
            if found is None or not signature or found.adapter.folder != folder:
                self._let_go(name)
                raise
            # A folder is written file by file: until it is whole again, the version that was read is served.
            logger.warning(
                "adapter %r has changed on disk and cannot be read, its earlier version is kept: %s", name, error
            )
            return found
        if found is not None and found.adapter.digest == adapter.digest and found.adapter.folder == folder:
            found.signature = signature
            return found
        self.loads += 1
        self._let_go(name)
        found = self._loaded[name] = Loaded(adapter, signature)
        for edit in adapter.edits:
            site = adapter.component, edit.block
            if edit.folded is None:
                assert edit.module is not None
                found.modules[site, edit.part] = edit.module
            else:
                stack = self.stacks.setdefault(site, Stack(edit.width))
                found.rows[site, edit.part] = stack.put(edit.folded)
        self._bytes += adapter.nbytes
        return found

    def _let_go(self, name: str) -> None:
        """Forget an adapter's present version, now or when the last request that holds it ends."""
        found = self._loaded.pop(name, None)
        if found is None:
            return
        found.wanted = False
        if not found.requests:
            self._free(found)

    def _free(self, found: Loaded) -> None:
        for (site, _), row in found.rows.items():
            self.stacks[site].drop(row)
        self._bytes -= found.adapter.nbytes
        found.rows, found.modules = {}, {}

    def _make_room(self) -> None:
        idle = [name for name, found in self._loaded.items() if not found.requests] if self._over_budget() else []
        for name in idle:
            if not self._over_budget():
                return
            self._let_go(name)
            self.evictions += 1

    def _over_budget(self) -> bool:
        return self._bytes > self.max_bytes or len(self._loaded) > (self.max_adapters or len(self._loaded))

    # Forwards

    def edit(
        self,
        site: Site,
        hidden: Float[Tensor, "*tokens channels"],
        runs: Sequence[Run],
        columns: slice | list[int] | None = None,
    ) -> Float[Tensor, "*tokens channels"]:
        """Edit the rows of a hidden state that its adapters edit at a site.

        Args:
            site: the site.
            hidden: the tokens of a flat batch; leading dimensions are flattened.
            runs: the edited rows, whose ``adapter`` is a ``Held``.
            columns: the channels that the edits see; None: all.

        Returns:
            A tensor of the same shape and dtype; the very same one where nothing is edited. Other rows keep their bits.
        """
        linear = [(run, row) for run in runs if (row := run.adapter.loaded.rows.get((site, run.part)))]
        others = [(run, edit) for run in runs if (edit := run.adapter.loaded.modules.get((site, run.part)))]
        if not linear and not others:
            return hidden
        edited = hidden.clone(memory_format=torch.contiguous_format)
        flat = edited.view(-1, hidden.shape[-1])
        seen = flat if columns is None else flat[:, columns]
        with torch.no_grad(), without_autocast(hidden.device.type):
            if linear:
                self._edit_linear(site, seen, linear)
            for run, edit in others:
                rows = seen[run.start : run.stop]
                after = edit.to(rows.device)(rows)
                seen[run.start : run.stop] = (
                    after if run.adapter.scale == 1 else rows + run.adapter.scale * (after - rows)
                )
        if isinstance(columns, list):
            flat[:, columns] = seen
        return edited

    def _edit_linear(self, site: Site, seen: Tensor, work: list[tuple[Run, int]]) -> None:
        factors = self.stacks[site].at(seen.device)
        dtype = compute_dtype(seen)
        A, b, B = factors if dtype == torch.float32 else (factor.to(dtype) for factor in factors)
        if len(work) > 1 and sum(run.stop - run.start for run, _ in work) <= _FEW_ROWS * len(work):
            index, of, scales = [], [], []
            for run, row in work:
                index += range(run.start, run.stop)
                of += [row] * (run.stop - run.start)
                scales += [run.adapter.scale] * (run.stop - run.start)
            rows, owners = torch.tensor([index, of], device=seen.device)
            h = seen[rows].to(dtype)
            delta = torch.bmm(torch.bmm(h.unsqueeze(1), A[owners]) + b[owners].unsqueeze(1), B[owners]).squeeze(1)
            if any(scale != 1 for scale in scales):
                delta *= torch.tensor(scales, dtype=dtype, device=seen.device).unsqueeze(-1)
            seen[rows] = (h + delta).to(seen.dtype)
            return
        for run, row in work:
            h = seen[run.start : run.stop].to(dtype)
            delta = (h @ A[row] + b[row]) @ B[row]
            seen[run.start : run.stop] = (h + run.adapter.scale * delta).to(seen.dtype)


def _signature(folder: Path) -> tuple[int, ...]:
    """What changes when a folder's files, or a user of a store, are replaced; empty where there is none."""
    try:
        if (user := user_of(folder)) is not None:
            return (int(user[0].digest(user[1]), 16),)
        found = [(folder / name).stat() for name in (CONFIG_FILE, WEIGHTS_FILE)]
    except (OSError, ReftuneError):
        return ()
    return tuple(n for stat in found for n in (stat.st_mtime_ns, stat.st_size, stat.st_ino))
