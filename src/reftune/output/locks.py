"""One process at a time in an output folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from reftune.errors import ReftuneError

LOCK_FILE = ".lock"


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold a folder's lock, **making the folder**; one that a dead process held is free.

    The other processes of a distributed training share the first one's.

    Raises:
        ReftuneError: another process, or another run of this one, writes there.
    """
    if int(os.environ.get("RANK", "0") or 0) > 0:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(str(folder / LOCK_FILE))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ReftuneError(
            f"{folder} is being written by another run: wait for it, stop it, or name another folder."
        ) from None
    try:
        yield
    finally:
        with suppress(OSError):  # while it is held: nobody else can have taken it up
            os.unlink(folder / LOCK_FILE)
        lock.release()


def refuse_if_locked(folder: Path) -> None:
    """Refuse a folder that another run writes; **makes nothing**, where `only_writer` would make the folder."""
    if (folder / LOCK_FILE).is_file():
        with only_writer(folder):
            pass
