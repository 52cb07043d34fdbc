"""One file of a store: a safetensors file in which every tensor is (rows, ...), and row i of all of them is one user's.

The file has its full size from the beginning (what is not written takes no room on disk). A row is written once, where
it lies, and is never written again while the index names it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
import weakref
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from reftune.errors import ReftuneError

Layout = dict[str, tuple[str, tuple[int, ...]]]
"""Data type (as safetensors writes it) and shape of one user's tensors, by name, in the order of the names."""
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LONGEST_HEADER = 1 << 24


def layout_of(stacked: Mapping[str, Tensor]) -> Layout:
    """The layout of one user's tensors, given (users, ...).

    Raises:
        ReftuneError: a tensor of another data type than the four of floats.
    """
    if wrong := [name for name, tensor in stacked.items() if tensor.dtype not in _NAMES]:
        raise ReftuneError(f"{wrong[0]} holds {stacked[wrong[0]].dtype}: a store keeps {', '.join(map(str, _NAMES))}.")
    return {name: (_NAMES[stacked[name].dtype], tuple(stacked[name].shape[1:])) for name in sorted(stacked)}


def row_bytes(layout: Layout) -> int:
    """Bytes of one user."""
    return sum(_sizes(layout))


def to_rows(stacked: Mapping[str, Tensor]) -> np.ndarray:
    """The users' bytes, (users, bytes): their tensors one after another, in the order of the names."""
    flat = [stacked[name].detach().cpu().contiguous() for name in sorted(stacked)]
    return torch.cat([tensor.flatten().view(torch.uint8).view(len(tensor), -1) for tensor in flat], 1).numpy()


def from_row(layout: Layout, row: np.ndarray) -> dict[str, Tensor]:
    """One user's tensors, from its bytes."""
    tensors, start = {}, 0
    for (name, (dtype, shape)), size in zip(layout.items(), _sizes(layout), strict=True):
        tensors[name] = torch.from_numpy(row[start : start + size].copy()).view(DTYPES[dtype]).view(shape)
        start += size
    return tensors


def finite_rows(layout: Layout, block: np.ndarray) -> np.ndarray:
    """Which of some rows, (rows, bytes), hold finite numbers alone."""
    finite, ends = np.ones(len(block), bool), np.cumsum(_sizes(layout))[:-1]
    parts = list(zip((dtype for dtype, _ in layout.values()), np.split(block, ends, 1), strict=True))
    for kind in {dtype for dtype, _ in parts}:  # one operation for all tensors of a type, usually for all
        held = np.concatenate([part for dtype, part in parts if dtype == kind], 1)
        finite &= torch.from_numpy(held).view(DTYPES[kind]).isfinite().all(1).numpy()
    return finite


class RowDigest:
    """Digests of users: of their names, and of their bytes as what a layout makes of them."""

    def __init__(self, layout: Layout):
        self._begun = hashlib.blake2b(json.dumps(list(layout.items())).encode(), digest_size=16)

    def __call__(self, name: str, row: np.ndarray) -> bytes:
        """The 16 bytes of a user's digest."""
        digest = self._begun.copy()
        digest.update(name.encode() + b"\0")
        digest.update(row.tobytes())
        return digest.digest()


class Shard:
    """A file of rows, open.

    Args:
        path: the file.
        store: which store it must belong to.
        writable: whether rows may be written.

    Attributes:
        layout: of a row.
        rows: how many there is room for.
        digest: of a user, from the name and the bytes.

    Raises:
        ReftuneError: no file, one that is cut off or damaged, a link, or one of another store.
    """

    def __init__(self, path: Path, store: str, writable: bool = False):
        self.path = path
        try:
            if not stat.S_ISREG(path.lstat().st_mode):
                raise ReftuneError(f"{path} is a link or no file: a store holds files alone; restore it.")
            self._file = os.open(path, os.O_RDWR if writable else os.O_RDONLY)
        except OSError as error:
            raise ReftuneError(f"{path} cannot be read ({error.strerror}): restore it from a copy.") from None
        weakref.finalize(self, os.close, self._file)
        raw = self._read(0, 8)
        length = int.from_bytes(raw, "little")
        header = self._read(8, length) if length <= _LONGEST_HEADER else b""
        try:
            found = json.loads(header)
            owner = found.pop("__metadata__")["store"]
            self.layout = {name: (one["dtype"], tuple(one["shape"][1:])) for name, one in sorted(found.items())}
            self.rows = next(iter(found.values()))["shape"][0]
            numbers = [self.rows, *(number for _, shape in self.layout.values() for number in shape)]
            intact = all(type(number) is int and number > 0 for number in numbers)
            intact = intact and raw + header == _header(self.layout, self.rows, owner)
        except (ValueError, TypeError, KeyError, AttributeError, StopIteration, RecursionError, OverflowError):
            intact, owner = False, None
        size = os.fstat(self._file).st_size
        if not intact or size != len(raw) + length + self.rows * row_bytes(self.layout):
            raise ReftuneError(f"{path} is cut off or damaged: restore it from a copy.")
        if owner != store:
            raise ReftuneError(f"{path} is a file of another store: restore this store's own from a copy.")
        self._begin = len(raw) + length
        self.digest = RowDigest(self.layout)

    @classmethod
    def create(cls, path: Path, store: str, layout: Layout, rows: int) -> Shard:
        """Make a file with room for ``rows`` users, **in place of what a writer that was killed left there**."""
        path.unlink(missing_ok=True)
        header = _header(layout, rows, store)
        with path.open("xb") as file:
            file.write(header)
            file.truncate(len(header) + rows * row_bytes(layout))
        return cls(path, store, writable=True)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows ``start`` to ``stop - 1``, (rows, bytes).

        Raises:
            ReftuneError: rows that it does not have, or a file that has been cut off since it was opened.
        """
        if not 0 <= start <= stop <= self.rows:
            raise ReftuneError(f"{self.path} has {self.rows} rows, not {stop}: restore store and file from one copy.")
        parts, begin = [], self._begin
        for size in _sizes(self.layout):
            raw = self._read(begin + start * size, (stop - start) * size)
            if len(raw) < (stop - start) * size:
                raise ReftuneError(f"{self.path} is cut off or damaged: restore it from a copy.")
            parts.append(np.frombuffer(raw, np.uint8).reshape(stop - start, size))
            begin += self.rows * size
        return np.concatenate(parts, 1)

    def write(self, start: int, block: np.ndarray) -> None:
        """Write rows from ``start`` on, (rows, bytes), down to the disk."""
        column, begin = 0, self._begin
        for size in _sizes(self.layout):
            raw = memoryview(block[:, column : column + size].tobytes())
            place = begin + start * size
            while raw:
                done = os.pwrite(self._file, raw, place)
                raw, place = raw[done:], place + done
            column, begin = column + size, begin + self.rows * size
        os.fsync(self._file)

    def _read(self, place: int, size: int) -> bytes:
        # Not a mapping: a file that is cut off while it is mapped kills the process that reads there.
        return os.pread(self._file, size, place)


def _sizes(layout: Layout) -> list[int]:
    return [DTYPES[dtype].itemsize * math.prod(shape) for dtype, shape in layout.values()]


def _header(layout: Layout, rows: int, store: str) -> bytes:
    """A safetensors header, as this library writes it: one that differs by a byte is not one of ours."""
    entries, begin = {}, 0
    for (name, (dtype, shape)), size in zip(layout.items(), _sizes(layout), strict=True):
        end = begin + rows * size
        entries[name] = {"dtype": dtype, "shape": [rows, *shape], "data_offsets": [begin, end]}
        begin = end
    text = json.dumps({"__metadata__": {"store": store}, **entries}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
