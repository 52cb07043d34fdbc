"""The adapters that may be served: names and folders, found without loading any."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from reftune.errors import ReftuneError
from reftune.users.names import is_name, is_store
from reftune.users.store import UserStore

CONFIG_FILE = "adapter_config.json"
_LOOK_AGAIN = 1.0
"""Seconds after which a folder is looked at again."""
_SETTLED = 2 * 10**9
"""Nanoseconds after which a change of a folder gets another time than the last, on every file system."""
_REMEMBERED = 65_536
"""Folders without links that are remembered."""


def lies_in(path: Path, roots: Iterable[Path]) -> bool:
    """Whether a path, with every link followed, lies in one of some folders."""
    real = os.path.realpath(path)
    return any(real == root or real.startswith(root + os.sep) for root in map(os.path.realpath, roots))


def refuse_links_out(folder: Path, roots: Collection[Path]) -> bool:
    """Refuse an adapter, or a store's user, that is a link to elsewhere, or of which a file is one.

    Args:
        folder: of the adapter, or ``STORE/NAME``.
        roots: the folders that are served.

    Returns:
        Whether there are links, all of which stay inside.

    Raises:
        ReftuneError: naming the link.
    """
    place = folder.parent if is_store(folder.parent) else folder
    links = [os.fspath(place)] if place.is_symlink() else []
    with suppress(OSError), os.scandir(place) as entries:
        links += [entry.path for entry in entries if entry.is_symlink()]
    for link in links:
        if not lies_in(Path(link), roots):
            raise ReftuneError(
                f"{link} is a link out of the folders that are served: put the file itself there "
                "(`hf download REPO --local-dir DIR` does)."
            )
    return bool(links)


class Catalogue:
    """Adapters by name, in the folders that were allowed; **looks at the disk again** when a name is asked for.

    A folder is an adapter itself (its name is the folder's), holds adapters one level down, or is a store of users,
    each of whom is an adapter in the place ``STORE/NAME``. A link that leads out of an allowed folder is not followed.
    Ten thousand folders are listed in well under a second, because nothing is read.

    Args:
        folders: the allowed folders.

    Attributes:
        folders: those of adapters.
        stores: those of users.

    Raises:
        ReftuneError: one that is not there, or two adapters of one name.
    """

    def __init__(self, folders: Sequence[str | Path]):
        given = [Path(folder).expanduser() for folder in folders]
        for folder in given:
            if not folder.is_dir():
                found = "is a file, and a folder is asked for" if folder.exists() else "there is no such folder"
                raise ReftuneError(f"--adapters {folder}: {found}.")
        self.stores = [UserStore.open(folder) for folder in given if is_store(folder)]
        self.folders = [folder for folder in given if not is_store(folder)]
        self._users: tuple[Any, list[str]] = (None, [])
        self._added: dict[str, Path] = {}
        self._removed: set[str] = set()
        self._found: dict[str, Path] = {}
        self._looked = (0.0, ())
        self._linkless: dict[Path, tuple[int, ...]] = {}
        self._lock = threading.Lock()
        for name in self._look(strict=True):
            if (user := self._user(name)) is not None:
                raise ReftuneError(f"two adapters are called {name!r}: {self._found[name]} and {user}; rename one.")
        if len(self.stores) > 1:
            counted = Counter(name for store in self.stores for name in store.names())
            if twice := [name for name, count in counted.items() if count > 1]:
                raise ReftuneError(f"two stores have a user {twice[0]!r}; rename one.")

    @property
    def roots(self) -> list[Path]:
        """The allowed folders, stores among them."""
        return [*self.folders, *(store.path for store in self.stores)]

    def names(self) -> list[str]:
        """Names of every adapter, sorted."""
        signature = [store.signature for store in self.stores]
        if self._users[0] != signature:
            self._users = signature, [name for store in self.stores for name in store.names()]
        found = self._look()
        return sorted([*found, *(name for name in self._users[1] if name not in self._removed and name not in found)])

    def adapters(self) -> dict[str, Path]:
        """The adapters that lie in folders of their own, by name: all but the users of stores."""
        return dict(self._look())

    def folder(self, name: str) -> Path | None:
        """Where an adapter lies, or stands for a user; None where there is none of that name (any more)."""
        found = self._look().get(name)
        if found is None and (user := self._user(name)) is not None:
            return user
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
        refuse_links_out(allowed[0], self.roots)
        with self._lock:
            if (name in self._found and name not in self._removed) or self._user(name) is not None:
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
        if name not in self._look() and self._user(name) is None:
            raise ReftuneError(f"name={name!r}: no such adapter is served.")
        with self._lock:
            self._added.pop(name, None)
            self._removed.add(name)
        self._look(again=True)

    def refuse_links_out(self, folder: Path) -> None:
        """As the function of this name; a folder without links is looked through again once it or its parent changes.

        Raises:
            ReftuneError: likewise.
        """
        parent, own = _stamp(folder.parent), _stamp(folder)
        place = folder if own else folder.parent  # users of a store share its folder
        if self._linkless.get(place) == (*parent, *own):
            return
        links = refuse_links_out(folder, self.roots)
        changed = max(*parent[:2], *own[:2], 0)
        if not links and time.time_ns() - changed > _SETTLED:
            if len(self._linkless) >= _REMEMBERED:
                self._linkless.clear()
            self._linkless[place] = (*parent, *own)

    def look_again(self) -> None:
        """Look at the folders now, whenever they were last looked at."""
        self._look(again=True)

    def _user(self, name: str) -> Path | None:
        """The place of a user of one of the stores."""
        if name in self._removed:
            return None
        return next((store.path / name for store in self.stores if name in store), None)

    def _allowed(self, path: Path) -> bool:
        return lies_in(path, self.folders)

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


def _stamp(folder: Path) -> tuple[int, ...]:
    """What changes where something is put into a folder, or another in its place; empty where there is none."""
    try:
        found = os.lstat(folder)
    except OSError:
        return ()
    return found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_dev
