"""Many users' edits in one folder: written and read a user at a time, listed without reading any.

::

    store = UserStore.create("users", config, "smollm2")    # the adapter_config that all users have in common
    store.write({"anna": tensors, "bob": others})           # all of them or none; a user who is there is replaced
    store.read("anna")                                       # tensors as adapter_model.safetensors names them
    store.export("anna", "adapters/anna")                    # an ordinary PEFT folder
    store.delete("bob")

The folder holds `users.sqlite`, which says where each user lies, and files of rows (`shards.py`). A row is written and
synced before the index names it, the index changes in one transaction, and what the index names is never written again:
a process that is killed at any point loses nothing that was saved. A second writer waits for the first; readers wait
for nobody. Every user has a digest in the index, of name and bytes, that is compared at each reading: what somebody
else changed is refused, and never given out as another user's (see docs/decisions/0012).

With a *shared part* (``write_shared``), a user has only what is not in it, and ``read`` gives both. Biases are a user's
own in any case: those of the shared part are where a new user's training begins.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sqlite3
import stat
import uuid
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from reftune.adapter.checkpoint import (
    CONFIG_FILE,
    EDIT_KEY,
    WEIGHTS_FILE,
    check_config,
    check_edits,
    not_finite,
    read_adapter_config,
    read_weights,
    trained_beside_edits,
)
from reftune.errors import ReftuneError
from reftune.output.files import replaced, write_text
from reftune.output.locks import only_writer
from reftune.output.targets import check_folder_target
from reftune.users.names import INDEX_FILE, check_user_name, is_name, is_store
from reftune.users.shards import Layout, RowDigest, Shard, finite_rows, from_row, layout_of, row_bytes, to_rows

FORMAT = "1"
_SCHEMA = (
    "CREATE TABLE facts (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
    "CREATE TABLE shards (shard INTEGER PRIMARY KEY, used INTEGER NOT NULL, live INTEGER NOT NULL)",
    "CREATE TABLE users (name TEXT PRIMARY KEY, shard INTEGER NOT NULL, row INTEGER NOT NULL, digest BLOB NOT NULL) "
    "WITHOUT ROWID",
)
_SIDE_FILES = ("", "-journal", "-wal", "-shm")
_BASE = "base_model_name_or_path"
_PASSING = {_BASE, "inference_mode", "peft_version", "auto_mapping", "revision", "runtime_config"}
"""Fields of a configuration in which users of one store may differ: none of them says what the edit is."""
_OWN = ".bias"
"""How a tensor's name ends that is a user's own, whatever the shared part holds."""
_SHARD_BYTES, _FEWEST_ROWS = 1 << 28, 64
_OPEN_FILES = 128
_OURS = re.compile(r"users-\d{6,}\.safetensors|shared-[0-9a-f]{32}\.safetensors")
_WAIT = 60.0
"""Seconds for which a writer waits for another."""
_BLOCK_BYTES = 1 << 24
"""Of rows that are read at once to verify or to move them."""


def user_of(folder: Path) -> tuple[UserStore, str] | None:
    """The store and the name of the user that ``STORE/NAME`` stands for; None where that is no place in a store.

    Raises:
        ReftuneError: a store that cannot be opened.
    """
    return (_opened(folder.parent), folder.name) if is_store(folder.parent) else None


class UserStore:
    """A store that is there; ``create`` makes one, ``open`` opens one. Threads and processes may share it.

    Args:
        path: its folder.

    Attributes:
        path: likewise.

    Raises:
        ReftuneError: no store there, or an index that is damaged or not of a store.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path).expanduser()
        self._known: dict[str, str] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._shards: dict[Path, Shard] = {}
        self._parts: dict[str, dict[str, Tensor]] = {}
        with self._reading():
            pass

    @classmethod
    def create(cls, path: str | Path, config: Mapping[str, Any], base: str) -> UserStore:
        """Make an empty store; **makes the folder**.

        Args:
            path: a folder that is new or empty.
            config: what all users have in common, as ``adapter_config.json`` holds it.
            base: the base model that they belong to.

        Raises:
            ReftuneError: a folder that holds something, or a configuration that no store can keep.
        """
        path = Path(path).expanduser()
        if (path / INDEX_FILE).is_file():
            raise ReftuneError(f"{path} is a store already: open it, or name another folder.")
        check_folder_target(path, "store ", ["run.yaml"])
        kept = json.dumps({key: config[key] for key in sorted(config.keys() - _PASSING)}, default=list)
        _check_config(path, json.loads(kept))
        if not isinstance(base, str) or not base:
            raise ReftuneError(f"base={base!r}: name the base model that the users belong to.")
        facts = {
            "format": FORMAT, "id": uuid.uuid4().hex, "config": kept, "base": base, "layout": "", "shared": "",
            "made": "0",
        }  # fmt: skip
        with only_writer(path), replaced(path / INDEX_FILE) as partial:
            if (path / INDEX_FILE).is_file():
                raise ReftuneError(f"{path} has become a store meanwhile: open it, or name another folder.")
            partial.unlink(missing_ok=True)
            with closing(sqlite3.connect(partial)) as db, db:
                for statement in _SCHEMA:
                    db.execute(statement)
                db.executemany("INSERT INTO facts VALUES (?, ?)", facts.items())
        _sync_folder(path)
        return cls(path)

    @classmethod
    def open(cls, path: str | Path) -> UserStore:
        """Open a store; reads its index's first page and no user.

        Raises:
            ReftuneError: as the class.
        """
        return cls(path)

    # What it holds

    @property
    def config(self) -> dict[str, Any]:
        """What all users have in common, and the base: as ``adapter_config.json`` of an exported user has it."""
        with self._reading():
            return {**json.loads(self._known["config"]), _BASE: self._known["base"]}

    @property
    def base(self) -> str:
        """The base model."""
        return self._known["base"]

    @property
    def has_shared(self) -> bool:
        """Whether there is a part that all users share."""
        with self._reading():
            return bool(self._known["shared"])

    @property
    def user_bytes(self) -> int:
        """Bytes of one user's own tensors, as the newest users have them; 0 where there is none."""
        with self._reading() as db:
            newest = db.execute("SELECT max(shard) FROM shards WHERE live > 0").fetchone()[0]
            return row_bytes(self._shard(newest).layout) if newest is not None else 0

    @property
    def shared_bytes(self) -> int:
        """Bytes of the part that all users share."""
        return sum(tensor.nbytes for tensor in self.shared().values())

    @property
    def signature(self) -> tuple[int, ...]:
        """Changes whenever the store does; reads nothing."""
        try:
            found = (self.path / INDEX_FILE).stat()
        except OSError:
            return ()
        return found.st_mtime_ns, found.st_size, found.st_ino

    def shared(self) -> dict[str, Tensor]:
        """The part that all users share, and the biases that new users begin with; empty where there is none.

        Raises:
            ReftuneError: a file that is missing, damaged, of another store, or not as it was written.
        """
        with self._reading():
            return self._shared(self._known["shared"])

    def names(self) -> Sequence[str]:
        """The users, sorted by the bytes of their names."""
        with self._reading() as db:
            return [name for (name,) in db.execute("SELECT name FROM users ORDER BY name")]

    def __len__(self) -> int:
        with self._reading() as db:
            return db.execute("SELECT count(*) FROM users").fetchone()[0]

    def __contains__(self, name: object) -> bool:
        with self._reading() as db:
            return isinstance(name, str) and is_name(name) and self._row_of(db, name) is not None

    def digest(self, name: str) -> str:
        """32 hexadecimal digits: equal where a user's name, edit, configuration and shared part are.

        Raises:
            ReftuneError: no such user.
        """
        with self._reading() as db:
            return self._digest(self._found(db, name)[2])

    def read(self, name: str) -> dict[str, Tensor]:
        """A user's tensors, bit for bit as they were written, with the shared part.

        Raises:
            ReftuneError: no such user; a file that is missing, damaged, of another store, or not as it was written.
        """
        return self.read_with_digest(name)[0]

    def read_with_digest(self, name: str) -> tuple[dict[str, Tensor], str]:
        """``read`` and ``digest`` of one version of a user.

        Raises:
            ReftuneError: as ``read``.
        """
        tried = None
        while True:
            with self._reading() as db:
                where = self._found(db, name)
                digest, shared = self._digest(where[2]), self._known["shared"]
            try:
                own = self._own(name, where)
                return {**self._shared(shared), **own}, digest
            except ReftuneError:
                if where == tried:  # it has not been moved meanwhile
                    raise
                tried = where

    def verify(self) -> list[str]:
        """Read everything and compare it with the index.

        Returns:
            A line for each user, file or part that is broken, which names it; empty where all is as it was written.
        """
        problems = []
        with self._reading() as db:
            db.execute("BEGIN")  # one state of the index, whatever is written meanwhile
            used = dict(db.execute("SELECT shard, used FROM shards"))
            try:
                self._shared(self._known["shared"])
            except ReftuneError as error:
                problems.append(str(error))
            if (found := db.execute("PRAGMA integrity_check(1)").fetchone()[0]) != "ok":
                problems.append(f"{self.path / INDEX_FILE} is damaged ({found}): restore it from a copy.")
            if db.execute("SELECT count(*) FROM users GROUP BY shard, row HAVING count(*) > 1").fetchone():
                problems.append(f"{self.path / INDEX_FILE} gives several users one row: restore it from a copy.")
            number, shard, begin, block, finite = None, None, 0, np.zeros((0, 0), np.uint8), np.zeros(0, bool)
            for name, *where in db.execute("SELECT name, shard, row, digest FROM users ORDER BY shard, row"):
                try:
                    check_user_name(name)
                    if where[0] != number:
                        number, shard, block = where[0], None, block[:0]
                        shard = self._shard(number)
                    if shard is None:
                        continue  # its file is told already
                    if not isinstance(where[1], int) or not 0 <= where[1] < used.get(number, 0):
                        raise ReftuneError(f"user {name!r}: row {where[1]!r} of {shard.path} was never written.")
                    if not begin <= where[1] < begin + len(block):
                        begin = where[1]
                        block = shard.read(begin, min(used[number], begin + _rows_at_once(shard.layout)))
                        finite = finite_rows(shard.layout, block)
                    _check_row(name, shard, block[where[1] - begin], where[2], bool(finite[where[1] - begin]))
                except ReftuneError as error:
                    problems.append(str(error))
        return problems

    def check_files(self) -> None:
        """Open every file that the index names, and read no user: what ``write`` would refuse is refused before work.

        Raises:
            ReftuneError: a file that is missing, cut off, damaged, a link or of another store.
        """
        with self._reading() as db:
            for (number,) in db.execute("SELECT shard FROM shards"):
                self._shard(number)

    # Changing it

    def write(self, users: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Add users, or **replace** those that are there: all of them or none.

        Args:
            users: each user's tensors by name; those of the shared part may be left out.

        Raises:
            ReftuneError: a name that is none, tensors that are not of such an adapter, or are not finite, or another
                shared part than the store's.
        """
        alike: dict[tuple[tuple[str, Any], ...], list[str]] = defaultdict(list)
        for name, tensors in users.items():
            alike[tuple(sorted((key, str(tensor.dtype)) for key, tensor in tensors.items()))].append(name)
        groups = []
        for names in alike.values():
            first = users[names[0]]
            for name in names:
                for key, tensor in users[name].items():
                    if tensor.shape != first[key].shape:
                        raise ReftuneError(
                            f"user {name!r}: {key} has shape {tuple(tensor.shape)}, {names[0]!r}'s has "
                            f"{tuple(first[key].shape)}: all users of a store have the same."
                        )
            groups.append((names, {key: torch.stack([users[name][key].detach() for name in names]) for key in first}))
        self._write(groups)

    def write_stacked(self, names: Sequence[str], tensors: Mapping[str, Tensor]) -> None:
        """``write`` of users whose tensors are stacked, (users, ...) in the order of ``names``.

        Raises:
            ReftuneError: as ``write``.
        """
        if wrong := [key for key, tensor in tensors.items() if tensor.shape[:1] != (len(names),)]:
            raise ReftuneError(f"{wrong[0]} has shape {tuple(tensors[wrong[0]].shape)} for {len(names)} users.")
        self._write([(list(names), tensors)])

    def write_shared(self, tensors: Mapping[str, Tensor]) -> None:
        """Set the part that all users share, once, before there are users.

        Raises:
            ReftuneError: users are there whose own part belongs to another one; tensors that are not of such an
                adapter, or are not finite.
        """
        stacked = {key: tensor.detach()[None] for key, tensor in tensors.items()}
        layout, block = layout_of(stacked), to_rows(stacked)
        _check_names(self.path, layout)
        if not finite_rows(layout, block).all():
            raise not_finite(self.path, "the shared part")
        digest = RowDigest(layout)("", block[0]).hex()
        with self._writing() as db:
            if digest == self._known["shared"]:
                return
            if db.execute("SELECT 1 FROM users").fetchone() or self._known["layout"]:
                raise ReftuneError(
                    f"{self.path} has users already, whose own parts belong to the present shared part: make a new "
                    "store for another one."
                )
            Shard.create(self._shared_file(digest), self._known["id"], layout, 1).write(0, block)
            _sync_folder(self.path)
            self._set(db, shared=digest)

    def delete(self, name: str, *more: str) -> None:
        """Remove users, all of them or none; their rows are given back to the disk when most are dead.

        Raises:
            ReftuneError: no such user.
        """
        with self._writing() as db:
            for one in dict.fromkeys((name, *more)):
                number = self._found(db, one)[0]
                db.execute("DELETE FROM users WHERE name = ?", (one,))
                db.execute("UPDATE shards SET live = live - 1 WHERE shard = ?", (number,))
            self._compact(db)
        self._give_back()

    # Folders

    def export(self, name: str, folder: str | Path) -> None:
        """Write a user as a folder that ``PeftModel.from_pretrained`` loads; **makes the folder**, new or empty.

        Raises:
            ReftuneError: as ``read``; a folder that holds something.
        """
        folder = Path(folder).expanduser()
        check_folder_target(folder, "folder ", [], [self.path])
        tensors = self.read(name)
        folder.mkdir(parents=True, exist_ok=True)
        if (run := self.path / "run.yaml").is_file() and not run.is_symlink():
            write_text(folder / run.name, run.read_text(encoding="utf-8"))
        with replaced(folder / WEIGHTS_FILE) as partial:
            save_file(tensors, partial, metadata={"format": "pt"})
        write_text(folder / CONFIG_FILE, json.dumps({**self.config, "inference_mode": True}, indent=2, sort_keys=True))

    def import_folder(self, folder: str | Path, name: str) -> None:
        """Add the adapter of a folder as a user, or **replace** that user by it.

        Raises:
            ReftuneError: a folder that holds no adapter, or one of another configuration, base or shared part.
        """
        folder = Path(folder).expanduser()
        check_user_name(name)
        config = read_adapter_config(folder)
        read_weights(folder, config)
        mine = self.config
        differing = [f"base {config.get(_BASE)!r}, not {self.base!r}"] if config.get(_BASE) != self.base else []
        for field in sorted((config.keys() | mine.keys()) - _PASSING):
            theirs, ours = config.get(field), mine.get(field)
            if (theirs or None) != (ours or None):
                differing.append(f"{field}={theirs!r}, not {ours!r}")
        if differing:
            raise ReftuneError(
                f"{folder}: another adapter than those of {self.path}: {'; '.join(differing)}. Keep it in a store of "
                "its own."
            )
        self.write({name: load_file(folder / WEIGHTS_FILE)})

    # The index

    @contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection]:
        index = self.path / INDEX_FILE
        if not index.is_file():
            raise ReftuneError(f"{self.path} is no store of users: it has no {INDEX_FILE}.")
        for side in _SIDE_FILES:
            file = index.with_name(INDEX_FILE + side)
            if os.path.lexists(file) and not stat.S_ISREG(file.lstat().st_mode):
                raise ReftuneError(f"{file} is a link or no file: a store holds files alone; restore it.")
        try:
            with closing(sqlite3.connect(f"{index.absolute().as_uri()}?mode=rw", _WAIT, uri=True)) as db:
                db.isolation_level = None
                db.execute("PRAGMA trusted_schema = OFF")
                schema = {text for (text,) in db.execute("SELECT sql FROM sqlite_master")} - {None}
                if schema != set(_SCHEMA):
                    raise ReftuneError(f"{index} is not the index of a store of users.")
                yield db
        except sqlite3.OperationalError as error:
            if "locked" in str(error):
                raise ReftuneError(f"{self.path} has been written by another process for {_WAIT:g} s: wait.") from None
            raise ReftuneError(f"{index} cannot be used ({error}): restore it from a copy, or make room.") from None
        except (sqlite3.Error, UnicodeError) as error:
            raise ReftuneError(f"{index} is damaged ({error}): restore it from a copy.") from None

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._connected() as db:
            self._adopt(db)
            yield db

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction, for which other writers wait; undone where anything fails."""
        with self._connected() as db:
            db.execute("BEGIN IMMEDIATE")
            try:
                self._adopt(db)
                yield db
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise
            self._adopt(db)

    def _adopt(self, db: sqlite3.Connection) -> None:
        """Learn what the index says of the store, and refuse what no store says."""
        facts = dict(db.execute("SELECT key, value FROM facts"))
        if facts == self._known:
            return
        where = self.path / INDEX_FILE
        try:
            if facts["format"] != FORMAT:
                raise ReftuneError(f"{where} has format {facts['format']!r}: upgrade reftune to read it.")
            config = json.loads(facts["config"])
            _check_config(self.path, config)
            layout = json.loads(facts["layout"] or "{}")
            shapes = {name: tuple(shape) for name, shape in layout.items()}
            well = all(type(number) is int and number > 0 for shape in shapes.values() for number in shape)
            well = well and all(EDIT_KEY.match(name) for name in shapes) and facts["made"].isdecimal()
            well = well and facts["id"].isalnum() and (not facts["shared"] or facts["shared"].isalnum())
            if not well or not isinstance(facts["base"], str):
                raise ValueError("facts without sense")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            if isinstance(error, ReftuneError):
                raise
            raise ReftuneError(f"{where} is damaged ({error}): restore it from a copy.") from None
        if any(facts[key] != self._known.get(key) for key in ("id", "layout")):
            self._shards = {}
        self._shapes, self._known = shapes, facts

    def _set(self, db: sqlite3.Connection, **facts: str) -> None:
        db.executemany("UPDATE facts SET value = ? WHERE key = ?", [(value, key) for key, value in facts.items()])
        self._adopt(db)

    def _row_of(self, db: sqlite3.Connection, name: str) -> tuple[Any, Any, Any] | None:
        return db.execute("SELECT shard, row, digest FROM users WHERE name = ?", (name,)).fetchone()

    def _found(self, db: sqlite3.Connection, name: str) -> tuple[Any, Any, Any]:
        if (found := self._row_of(db, check_user_name(name))) is None:
            raise ReftuneError(f"{self.path} has no user {name!r}; `reftune store list {self.path}` lists them.")
        if [type(part) for part in found] != [int, int, bytes]:
            raise ReftuneError(f"{self.path / INDEX_FILE} is damaged at user {name!r}: restore it from a copy.")
        return found

    def _digest(self, own: bytes) -> str:
        common = [self._known["config"], self._known["base"], self._known["shared"]]
        return hashlib.blake2b(json.dumps(common).encode() + own, digest_size=16).hexdigest()

    # Rows

    def _shard(self, number: Any) -> Shard:
        """A file of users, for reading; kept open."""
        key = self._shard_file(number)
        if key not in self._shards:
            shard = Shard(key, self._known["id"])
            if {name: shape for name, (_, shape) in shard.layout.items()} != self._shapes:
                raise ReftuneError(f"{key} holds other tensors than this store's users: restore it from a copy.")
            while len(self._shards) >= _OPEN_FILES:
                self._shards.pop(next(iter(self._shards)), None)
            self._shards[key] = shard
        return self._shards[key]

    def _own(self, name: str, where: tuple[int, int, bytes]) -> dict[str, Tensor]:
        number, row, digest = where
        try:
            shard = self._shard(number)
            block = shard.read(row, row + 1)
            _check_row(name, shard, block[0], digest, bool(finite_rows(shard.layout, block)[0]))
            return from_row(shard.layout, block[0])
        except ReftuneError:
            self._shards.pop(self._shard_file(number), None)
            raise

    def _shared(self, digest: str) -> dict[str, Tensor]:
        """The shared part of that digest: tensors of the caller's own."""
        if not digest:
            return {}
        if digest not in self._parts:
            shard = Shard(self._shared_file(digest), self._known["id"])
            block = shard.read(0, 1)
            if shard.digest("", block[0]).hex() != digest or not finite_rows(shard.layout, block).all():
                raise ReftuneError(f"{shard.path} is not as it was written: restore it from a copy.")
            self._parts = {digest: from_row(shard.layout, block[0])}
        return {key: tensor.clone() for key, tensor in self._parts[digest].items()}

    def _write(self, groups: Sequence[tuple[list[str], Mapping[str, Tensor]]]) -> None:
        names = [check_user_name(name) for group, _ in groups for name in group]
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise ReftuneError(f"user {twice[0]!r} is written twice at once: give each user one edit.")
        with self._writing() as db:
            shared = self._shared(self._known["shared"])
            common = layout_of({key: part[None] for key, part in shared.items()})
            checked = [(group, self._own_part(group, tensors, shared)) for group, tensors in groups]
            for group, own in checked:
                self._check_layout(db, group[0], layout_of(own), common)
            for group, own in checked:
                layout = layout_of(own)
                digest, step = RowDigest(layout), _rows_at_once(layout)
                for begin in range(0, len(group), step):
                    some = group[begin : begin + step]
                    block = to_rows({key: tensor[begin : begin + step] for key, tensor in own.items()})
                    self._put(db, some, layout, block, [digest(*pair) for pair in zip(some, block, strict=True)])
            self._compact(db)
        self._give_back()

    def _own_part(
        self, names: Sequence[str], tensors: Mapping[str, Tensor], shared: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """What users hold beside the shared part, whose tensors must be the store's where they are given."""
        shared = {key: part for key, part in shared.items() if not key.endswith(_OWN)}
        for key, tensor in tensors.items():
            if key in shared and not (
                tensor.dtype == shared[key].dtype and bool((tensor.detach().cpu() == shared[key]).all())
            ):
                raise ReftuneError(
                    f"user {names[0]!r}: {key} is not that of the store's shared part, to which a user's own part "
                    "belongs; write such users into a store of their own."
                )
            finite = tensor.detach().isfinite().flatten(1).all(1)
            if not bool(finite.all()):
                raise not_finite(self.path, f"{key} of user {names[int(finite.int().argmin())]!r}")
        return {key: tensor for key, tensor in tensors.items() if key not in shared}

    def _check_layout(self, db: sqlite3.Connection, name: str, layout: Layout, shared: Layout) -> None:
        """Refuse tensors that are not the users' of this store; the first user says which shapes they have."""
        if not layout:
            raise ReftuneError(f"user {name!r} holds nothing but the shared part: write its own tensors.")
        shapes = {key: shape for key, (_, shape) in layout.items()}
        if not self._shapes:
            _check_names(self.path, layout)
            found = {key: (shape, dtype) for key, (dtype, shape) in {**shared, **layout}.items()}
            check_edits(self.path, json.loads(self._known["config"]), found)
            self._set(db, layout=json.dumps(shapes))
        for key in sorted(shapes.keys() | self._shapes.keys()):
            if shapes.get(key) != self._shapes.get(key):
                here, there = (found.get(key, "no such tensor") for found in (shapes, self._shapes))
                raise ReftuneError(f"user {name!r}: {key} has shape {here}; users of {self.path} have {there}.")

    def _put(
        self, db: sqlite3.Connection, names: Sequence[str], layout: Layout, block: np.ndarray, digests: Sequence[bytes]
    ) -> None:
        """Write rows where there is room, and let the index name them."""
        begin = 0
        while begin < len(names):
            number, shard, used = self._room(db, layout, len(names) - begin)
            count = min(shard.rows - used, len(names) - begin)
            shard.write(used, block[begin : begin + count])
            some, rows = names[begin : begin + count], range(used, used + count)
            before = [found[0] for name in some if (found := self._row_of(db, name))]
            for old, dead in Counter(before).items():
                db.execute("UPDATE shards SET live = live - ? WHERE shard = ?", (dead, old))
            entries = zip(some, [number] * count, rows, digests[begin : begin + count], strict=True)
            db.executemany("INSERT OR REPLACE INTO users VALUES (?, ?, ?, ?)", sorted(entries))
            db.execute("UPDATE shards SET used = used + ?, live = live + ? WHERE shard = ?", (count, count, number))
            begin += count

    def _room(self, db: sqlite3.Connection, layout: Layout, wanted: int) -> tuple[int, Shard, int]:
        """A file with room for such rows, its number, and how many rows it holds already."""
        held = 0
        for number, used in db.execute("SELECT shard, used FROM shards ORDER BY shard DESC").fetchall():
            shard = self._shard(number)
            if shard.layout == layout:
                if used < shard.rows:
                    return number, Shard(shard.path, self._known["id"], writable=True), used
                held = shard.rows
                break
        rows = min(max(wanted, 2 * held, _FEWEST_ROWS), max(1, _SHARD_BYTES // row_bytes(layout)))
        number = int(self._known["made"]) + 1
        self._set(db, made=str(number))
        db.execute("INSERT INTO shards VALUES (?, 0, 0)", (number,))
        shard = Shard.create(self._shard_file(number), self._known["id"], layout, rows)
        _sync_folder(self.path)
        return number, shard, 0

    def _compact(self, db: sqlite3.Connection) -> None:
        """Where most rows are dead, move the living ones of the files that have dead ones, and forget those files."""
        used, live = db.execute("SELECT total(used), total(live) FROM shards").fetchone()
        if used - live <= max(live, _FEWEST_ROWS):
            return
        for (number,) in db.execute("SELECT shard FROM shards WHERE used > live").fetchall():
            rows = db.execute("SELECT name, row, digest FROM users WHERE shard = ? ORDER BY row", (number,)).fetchall()
            old = self._shard(number) if rows else None
            db.execute("DELETE FROM shards WHERE shard = ?", (number,))
            step = _rows_at_once(old.layout) if old else 1
            for begin in range(0, old.rows if old else 0, step):
                some = [row for row in rows if begin <= row[1] < begin + step]
                if old and some:
                    block = old.read(begin, min(old.rows, begin + step))[[row - begin for _, row, _ in some]]
                    self._put(db, [row[0] for row in some], old.layout, block, [row[2] for row in some])

    # Files

    def _shard_file(self, number: Any) -> Path:
        if not isinstance(number, int) or number < 0:
            raise ReftuneError(f"{self.path / INDEX_FILE} is damaged (file {number!r}): restore it from a copy.")
        return self.path / f"users-{number:06}.safetensors"

    def _shared_file(self, digest: str) -> Path:
        return self.path / f"shared-{digest}.safetensors"

    def _give_back(self) -> None:
        """Remove files that the index does not name (any more); other writers wait meanwhile."""
        with self._connected() as db:
            db.execute("BEGIN IMMEDIATE")
            kept = {self._shard_file(number) for (number,) in db.execute("SELECT shard FROM shards")}
            kept.add(self._shared_file(db.execute("SELECT value FROM facts WHERE key = 'shared'").fetchone()[0]))
            for path in self.path.iterdir():
                if _OURS.fullmatch(path.name) and path not in kept:
                    path.unlink()
            db.execute("ROLLBACK")


def import_folder(path: str | Path, folder: str | Path, name: str) -> UserStore:
    """Add the adapter of a folder to a store, which is **made** for such adapters where there is none.

    Raises:
        ReftuneError: as ``UserStore.create`` and ``UserStore.import_folder``.
    """
    check_user_name(name)
    path, folder = Path(path).expanduser(), Path(folder).expanduser()
    config = read_adapter_config(folder)
    read_weights(folder, config)
    if not is_store(path) and not config.get(_BASE):
        raise ReftuneError(f"{folder / CONFIG_FILE} does not say which base model it belongs to: add {_BASE}.")
    store = UserStore(path) if is_store(path) else UserStore.create(path, config, config[_BASE])
    store.import_folder(folder, name)
    return store


@lru_cache(maxsize=16)
def _opened(path: Path) -> UserStore:
    return UserStore.open(path)


def _rows_at_once(layout: Layout) -> int:
    return max(1, _BLOCK_BYTES // row_bytes(layout))


def _check_config(path: Path, config: Mapping[str, Any]) -> None:
    where = f"{path / INDEX_FILE}: "
    check_config(where, config)
    if config.get("peft_type") != "REFT":
        raise ReftuneError(f"{where}peft_type is {config.get('peft_type')!r}, not 'REFT': a store keeps ReFT adapters.")
    if beside := trained_beside_edits(config):
        raise ReftuneError(f"{where}{beside}: a store keeps edits alone; keep such adapters in folders.")


def _check_names(path: Path, layout: Layout) -> None:
    if foreign := [key for key in layout if not EDIT_KEY.match(key)]:
        raise ReftuneError(f"{path}: {foreign[0]!r} is no tensor of an edit; a store keeps edits alone.")


def _check_row(name: str, shard: Shard, row: np.ndarray, digest: Any, finite: bool) -> None:
    if shard.digest(name, row) != digest:
        raise ReftuneError(f"user {name!r} in {shard.path} is not as it was written: restore it from a copy.")
    if not finite:
        raise not_finite(shard.path, f"user {name!r}")


def _sync_folder(path: Path) -> None:
    """Make sure that a new file's name is on the disk, as its content is."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
