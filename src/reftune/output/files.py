"""Files replaced whole or not at all, and what it means that one could not be written."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_FULL = ("os error 28", "os error 122", "No space left on device", "Disk quota exceeded")
_FAILED = (*_FULL, "os error", "PytorchStreamWriter", "inline_container", "file write failed")


def write_failure(error: BaseException) -> str | None:
    """Why a file could not be written, or None where the error is about something else.

    torch, safetensors and tokenizers report a full disk as errors of their own, tokenizers as a bare ``Exception``.
    """
    text = str(error).split("\n")[0]
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or any(word in str(error) for word in _FULL):
        return "the disk is full"
    if isinstance(error, OSError):
        return error.strerror or text
    return text if isinstance(error, Exception) and any(word in str(error) for word in _FAILED) else None


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A scratch file to write, which **takes the place of** ``path`` when the ``with`` block ends without an error."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a file, whole or not at all, **in place of the one that is there**."""
    with replaced(path) as partial:
        partial.write_text(text, encoding="utf-8")
