"""What was computed of each example, within a budget.

Host memory first, then memory-mapped files, else computed anew. One store serves one training, or several in turn
(``ReftTrainer(..., prefix_store=store)``): keys name all that decides the tensors (see ``base_identity``).
"""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import Tensor

GIB = 1024**3


@dataclass
class Entry:
    """One stored tensor group.

    Attributes:
        tensors: by name.
        used: the pass in which it was last asked for.
        file: where it lies when it is not in memory.
    """

    tensors: dict[str, Tensor]
    used: int
    file: Path | None = None

    @property
    def bytes(self) -> int:
        """Size of its tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())


class PrefixStore:
    """A dictionary of tensors with a budget.

    Rows come round once an epoch, so throwing out the least recently used would throw out just what comes next. What is
    stored therefore stays, and only entries that a whole pass has not asked for (rows that are no longer in the data,
    other layers' of an earlier training) make room for new ones. Where there is no room, a row is not stored and is
    computed anew each time.

    Args:
        memory_bytes: budget of host memory; None: a quarter of what is free now, shared out among this machine's
            processes.
        disk_bytes: budget of memory-mapped files; None: as much again, and at most a quarter of the free disk.
    """

    def __init__(self, memory_bytes: int | None = None, disk_bytes: int | None = None) -> None:
        share = 4 * int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # processes that train together each have a store
        self.memory_budget = psutil.virtual_memory().available // share if memory_bytes is None else memory_bytes
        free_disk = shutil.disk_usage(tempfile.gettempdir()).free
        self.disk_budget = min(self.memory_budget, free_disk // share) if disk_bytes is None else disk_bytes
        self.memory_used = self.disk_used = 0
        self.hits = self.misses = self.refused = self.evicted = 0
        self.passes = 0
        self._entries: dict[bytes, Entry] = {}
        self._folder: Path | None = None
        self._files = 0

    def __len__(self) -> int:
        return len(self._entries)

    def next_pass(self) -> None:
        """Begin another pass over the data."""
        self.passes += 1

    def get(self, key: bytes) -> dict[str, Tensor] | None:
        """An entry's tensors (memory-mapped ones are read where they are used), or None."""
        entry = self._entries.get(key)
        if entry is None:
            self.misses += 1
            return None
        self.hits += 1
        entry.used = self.passes
        return entry.tensors

    def put(self, key: bytes, tensors: dict[str, Tensor]) -> None:
        """Store copies of tensors under a key, if there is or can be made room."""
        if key in self._entries:
            return
        entry = Entry(tensors, self.passes)
        size = entry.bytes
        if self.memory_used + size > self.memory_budget:
            self._make_room(size, on_disk=False)
        if self.memory_used + size > self.memory_budget and self.disk_used + size > self.disk_budget:
            self._make_room(size, on_disk=True)
        if self.memory_used + size <= self.memory_budget:
            entry.tensors = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
            self.memory_used += size
        elif self.disk_used + size <= self.disk_budget:
            entry.file, entry.tensors = self._write(tensors)
            self.disk_used += size
        else:
            self.refused += 1
            return
        self._entries[key] = entry

    def _make_room(self, size: int, on_disk: bool) -> None:
        """Forget entries that were not asked for lately until `size` bytes fit, in memory or on disk."""
        budget, used = (self.disk_budget, self.disk_used) if on_disk else (self.memory_budget, self.memory_used)
        for key, entry in list(self._entries.items()):
            if used + size <= budget:
                break
            if (entry.file is not None) == on_disk and entry.used < self.passes - 1:
                used -= entry.bytes
                self.evicted += 1
                del self._entries[key]
                for name in entry.tensors:
                    if entry.file is not None:
                        Path(f"{entry.file}-{name}").unlink(missing_ok=True)
        if on_disk:
            self.disk_used = used
        else:
            self.memory_used = used

    def _write(self, tensors: dict[str, Tensor]) -> tuple[Path, dict[str, Tensor]]:
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="reftune-prefixes-"))
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        path = self._folder / f"{self._files}"
        self._files += 1
        mapped: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            file = f"{path}-{name}"
            if tensor.numel() == 0:
                mapped[name] = tensor.detach().cpu()
                continue
            flat = torch.from_file(file, shared=True, size=tensor.numel(), dtype=tensor.dtype)
            mapped[name] = flat.view(tensor.shape)
            mapped[name].copy_(tensor.detach())
        return path, mapped

    def close(self) -> None:
        """Forget everything and remove the files."""
        self._entries.clear()
        self.memory_used = self.disk_used = 0
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def counts(self) -> dict[str, int]:
        """How often it was asked so far, and with what result."""
        return {"hits": self.hits, "misses": self.misses, "not_stored": self.refused, "evicted": self.evicted}

    def summary(self) -> dict[str, int]:
        """Entries, bytes, hits, misses, refusals and evictions."""
        return {
            "entries": len(self),
            "memory_bytes": self.memory_used,
            "memory_budget_bytes": self.memory_budget,
            "disk_bytes": self.disk_used,
            **self.counts(),
        }
