"""Where output may be written: nothing is replaced or deleted that this tool did not write."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from reftune.errors import ReftuneError

_OF_NO_ONE = {".gitkeep", ".gitignore", ".DS_Store", "lost+found"}


def check_file_target(path: Path, flag: str, inputs: Iterable[Any], ours: Callable[[Path], bool]) -> None:
    """Make sure that a file may be written, before anything is computed for it.

    Args:
        path: the file.
        flag: what named it, for the message (`--out`).
        inputs: what is read: names of files, or of anything else.
        ours: whether a file that is not empty is such a result of this tool (`result_with`); others are somebody's.

    Raises:
        ReftuneError: a folder, a device, a link, an input, somebody's file, or a place where nothing can be written.
    """
    where = f"{flag} {path}"
    kind = _checked_kind(path, where)
    if kind is not None and stat.S_ISDIR(kind):
        raise ReftuneError(f"{where} is a folder; name a file.")
    _check_inputs(path, where, inputs)
    if kind is not None and path.stat().st_size and not ours(path):
        raise ReftuneError(f"{where} holds something else than such results; name another file, or remove it.")


def refuse_dangling(path: Path) -> None:
    """Refuse a link to where nothing is.

    Raises:
        ReftuneError: naming the link and what it leads to.
    """
    for link in (path, *path.parents):
        if link.is_symlink() and not link.exists():
            raise ReftuneError(f"{link} is a link to {os.readlink(link)}, where nothing is: mend or remove the link")


def result_with(name: str) -> Callable[[Path], bool]:
    """Whether a file's first record (JSON, a line or the whole; or a table's header) has this name and `adapter`.

    Every result of a command says which adapter it is of; what somebody else wrote does not.
    """
    return lambda path: {name, "adapter"} <= _first_names(path)


def _first_names(path: Path) -> set[str]:
    with path.open("rb") as opened:
        first = opened.readline()
        try:
            found = json.loads(first + opened.read() if first.strip() == b"{" else first)
        except (ValueError, RecursionError):
            return set(first.decode(errors="replace").strip().split(","))
    return set(found) if isinstance(found, dict) else set()


def check_folder_target(
    path: Path, flag: str, marks: Iterable[str], inputs: Iterable[Any] = (), model: Any = None
) -> None:
    """Make sure that a folder may be written into, before anything is computed for it.

    Args:
        path: the folder.
        flag: what named it, for the message (`output=`).
        marks: patterns of names that a folder of ours holds; one that holds others alone is somebody's.
        inputs: what is read: names of files, or of anything else.
        model: the base model's name, which may be a folder.

    Raises:
        ReftuneError: a file, a device, a link, the model's folder, somebody's folder, or a place where nothing can be
            written.
    """
    where = f"{flag}{str(path)!r}"
    kind = _checked_kind(path, where)
    if kind is None:
        return
    if not stat.S_ISDIR(kind):
        raise ReftuneError(f"{where} is a file; name a folder.")
    if model is not None and _same(path, model):
        raise ReftuneError(f"{where} is the base model's folder; name another.")
    _check_inputs(path, where, inputs)
    held = sorted(entry.name for entry in path.iterdir() if entry.name not in _OF_NO_ONE)
    if held and not any(next(path.glob(mark), None) is not None for mark in marks):
        shown = ", ".join(held[:3]) + (", ..." if len(held) > 3 else "")
        raise ReftuneError(f"{where} holds files that are not of such an output ({shown}): name a new or empty folder.")


def _checked_kind(path: Path, where: str) -> int | None:
    """What is there (`st_mode`), or None where a file or folder could be made."""
    if "\0" in str(path) or not str(path).strip():
        raise ReftuneError(f"{where}: that is no name; give one.")
    try:
        found = path.lstat()
    except FileNotFoundError:
        _check_parent(path, where)
        return None
    except OSError as error:
        raise ReftuneError(f"{where} cannot be written: {error.strerror or error}.") from None
    if stat.S_ISLNK(found.st_mode):
        there = "" if path.exists() else ", where nothing is"
        raise ReftuneError(
            f"{where} is a link to {os.readlink(path)}{there}; name the place itself, or remove the link."
        )
    if not stat.S_ISDIR(found.st_mode) and not stat.S_ISREG(found.st_mode):
        raise ReftuneError(f"{where} is a device, pipe or socket; name a file or folder.")
    if not os.access(path, os.W_OK):
        raise ReftuneError(f"{where} cannot be written: permission denied; name another place.")
    return found.st_mode


def _check_parent(path: Path, where: str) -> None:
    parent = path.absolute().parent
    while not parent.exists():
        if parent.is_symlink():
            raise ReftuneError(f"{where}: {parent} is a link to {os.readlink(parent)}, where nothing is.")
        parent = parent.parent
    if not parent.is_dir():
        raise ReftuneError(f"{where}: {parent} is no folder; name another place.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ReftuneError(f"{where}: nothing can be written into {parent} (permission denied); name another place.")


def _check_inputs(path: Path, where: str, inputs: Iterable[Any]) -> None:
    for one in inputs:
        if one is not None and _same(path, one):
            raise ReftuneError(f"{where} is what is read; name another place, so that it stays.")


def _same(path: Path, other: Any) -> bool:
    with suppress(OSError, ValueError):
        return os.path.samefile(path, Path(str(other)).expanduser())
    return False
