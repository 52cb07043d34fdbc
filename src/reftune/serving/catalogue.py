"""The adapters that may be served: names and folders, found without loading any."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from reftune.errors import ReftuneError

CONFIG_FILE = "adapter_config.json"
_LOOK_AGAIN = 1.0
"""Seconds after which a folder is looked at again."""


class Catalogue:
    """Adapters by name, in the folders that were allowed; **looks at the disk again** when a name is asked for.

    A folder is an adapter itself (its name is the folder's), or holds adapters one level down. A link that leads out of
    an allowed folder is not followed. Ten thousand folders are listed in well under a second, because nothing is read.

    Args:
        folders: the allowed folders.

    Raises:
        ReftuneError: one that is not there, or two adapters of one name.
    """

    def __init__(self, folders: Sequence[str | Path]):
        self.folders = [Path(folder).expanduser() for folder in folders]
        for folder in self.folders:
            if not folder.is_dir():
                raise ReftuneError(f"--adapters {folder}: there is no such folder.")
        self._added: dict[str, Path] = {}
        self._removed: set[str] = set()
        self._found: dict[str, Path] = {}
        self._looked = (0.0, ())
        self._lock = threading.Lock()
        self._look(strict=True)

    def names(self) -> list[str]:
        """Names of every adapter, sorted."""
        return sorted(self._look())

    def folder(self, name: str) -> Path | None:
        """Where an adapter lies; None where there is none of that name (any more)."""
        found = self._look().get(name)
        if found is None or not (found / CONFIG_FILE).is_file():
            found = self._look(again=True).get(name)
        return found

    def add(self, name: str, folder: str | Path) -> Path:
        """Serve one more adapter, from inside an allowed folder.

        Raises:
            ReftuneError: a name that is taken or is no name; a folder outside the allowed ones, or without an adapter.
        """
        if not is_name(name):
            raise ReftuneError(
                f"name={name!r}: an adapter's name has no slashes, no leading dot, and 1 to 128 characters."
            )
        if not str(folder).isprintable():
            raise ReftuneError(f"path={str(folder)!r}: is no path.")
        place = Path(folder)
        inside = [place] if place.is_absolute() else [root / place for root in self.folders]
        allowed = [path for path in inside if self._allowed(path) and (path / CONFIG_FILE).is_file()]
        if not allowed:
            raise ReftuneError(f"path={str(folder)!r}: no adapter of that path lies in the folders that are served.")
        with self._lock:
            if name in self._found and name not in self._removed:
                raise ReftuneError(f"name={name!r}: an adapter of that name is served already.")
            self._removed.discard(name)
            self._added[name] = allowed[0]
        self._look(again=True)
        return allowed[0]

    def remove(self, name: str) -> None:
        """Serve an adapter no longer; its files stay.

        Raises:
            ReftuneError: there is none of that name.
        """
        if name not in self._look():
            raise ReftuneError(f"name={name!r}: no such adapter is served.")
        with self._lock:
            self._added.pop(name, None)
            self._removed.add(name)
        self._look(again=True)

    def look_again(self) -> None:
        """Look at the folders now, whenever they were last looked at."""
        self._look(again=True)

    def _allowed(self, path: Path) -> bool:
        """Whether a path, with every link followed, lies in an allowed folder."""
        real = os.path.realpath(path)
        roots = [os.path.realpath(folder) for folder in self.folders]
        return any(real == root or real.startswith(root + os.sep) for root in roots)

    def _look(self, again: bool = False, strict: bool = False) -> dict[str, Path]:
        with self._lock:
            now, (at, stamps) = time.monotonic(), self._looked
            if not again and now - at < _LOOK_AGAIN:
                return self._found
            stamp = tuple(folder.stat().st_mtime_ns if folder.is_dir() else 0 for folder in self.folders)
            if again or stamp != stamps or strict:
                self._found = self._scan(strict)
            self._looked = (now, stamp)
            return self._found

    def _scan(self, strict: bool) -> dict[str, Path]:
        found: dict[str, Path] = {}
        for folder in self.folders:
            if (folder / CONFIG_FILE).is_file():
                inside = [(folder.resolve().name, folder)]
            elif folder.is_dir():
                with os.scandir(folder) as entries:
                    inside = [(entry.name, Path(entry.path)) for entry in entries if self._is_adapter(entry)]
            else:
                inside = []
            for name, path in inside:
                if not is_name(name):
                    continue
                if strict and name in found:
                    raise ReftuneError(f"two adapters are called {name!r}: {found[name]} and {path}; rename one.")
                found.setdefault(name, path)
        return {name: path for name, path in (found | self._added).items() if name not in self._removed}

    def _is_adapter(self, entry: os.DirEntry[str]) -> bool:
        if entry.is_symlink() and not self._allowed(Path(entry.path)):
            return False
        return os.path.isfile(os.path.join(entry.path, CONFIG_FILE))


def is_name(name: str) -> bool:
    """Whether a text can be an adapter's name: it is no path, is printable, and is not too long."""
    return (
        0 < len(name) <= 128
        and name.isprintable()
        and name[0] not in ". "
        and not any(mark in name for mark in "/\\:*")
    )
