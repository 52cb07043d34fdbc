"""Stores that somebody has tampered with: one clear error, and never a wrong user's edit."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from pathlib import Path

import pytest
import torch

from reftune.errors import ReftuneError
from reftune.serving.folded import read_folded
from reftune.users.names import INDEX_FILE
from reftune.users.store import UserStore, user_of
from tests.users.test_store import CONFIG, edit, same

SHARD = "users-000001.safetensors"


def make_store(root: Path, name: str = "store", shift: int = 0) -> UserStore:
    store = UserStore.create(root / name, CONFIG, "tiny")
    store.write({"anna": edit(1 + shift), "bob": edit(2 + shift)})
    return store


def sql(statement: str):
    def tamper(store: UserStore) -> None:
        db = sqlite3.connect(store.path / INDEX_FILE)
        with db:
            db.execute(statement)
        db.close()

    return tamper


def shard_bytes(change):
    def tamper(store: UserStore) -> None:
        path = store.path / SHARD
        path.write_bytes(change(path.read_bytes()))

    return tamper


def index_bytes(change):
    def tamper(store: UserStore) -> None:
        path = store.path / INDEX_FILE
        path.write_bytes(change(path.read_bytes()))

    return tamper


def header(change):
    """The shard with another header, its length made to fit."""

    def changed(raw: bytes) -> bytes:
        length = int.from_bytes(raw[:8], "little")
        text = json.dumps(change(json.loads(raw[8 : 8 + length])), separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text + raw[8 + length :]

    return shard_bytes(changed)


def each(**fields):
    return lambda found: {k: v if k == "__metadata__" else {**v, **fields} for k, v in found.items()}


def nan(store: UserStore) -> None:
    raw = bytearray((store.path / SHARD).read_bytes())
    begin = 8 + int.from_bytes(raw[:8], "little")
    raw[begin : begin + 4] = b"\0\0\xc0\x7f"
    (store.path / SHARD).write_bytes(raw)


def other_stores_shard(store: UserStore) -> None:
    other = make_store(store.path.parent, "other", 10)
    shutil.copy(other.path / SHARD, store.path / SHARD)


def old_shard(store: UserStore) -> None:
    raw = (store.path / SHARD).read_bytes()
    store.write({"anna": edit(7)})
    (store.path / SHARD).write_bytes(raw)


def link(name: str):
    def tamper(store: UserStore) -> None:
        path = store.path / name
        path.rename(store.path.parent / "moved") if path.exists() else (store.path.parent / "moved").write_text("x")
        path.symlink_to(store.path.parent / "moved")

    return tamper


def pipe(store: UserStore) -> None:
    (store.path / SHARD).unlink()
    os.mkfifo(store.path / SHARD)


TAMPERED = {
    "an index that is no database": index_bytes(lambda raw: b"hello" * 500),
    "an index that is cut off": index_bytes(lambda raw: raw[: len(raw) // 2]),
    "an empty index": index_bytes(lambda raw: b""),
    "an index full of noise": index_bytes(lambda raw: raw[:100] + bytes(range(256)) * 60),
    "another schema": sql("CREATE TABLE more (x)"),
    "a view with a trigger's power": sql("CREATE VIEW v AS SELECT load_extension('x')"),
    "a trigger": sql("CREATE TRIGGER t AFTER DELETE ON users BEGIN DELETE FROM shards; END"),
    "a table dropped": sql("DROP TABLE facts"),
    "facts missing": sql("DELETE FROM facts WHERE key = 'config'"),
    "a newer format": sql("UPDATE facts SET value = '9' WHERE key = 'format'"),
    "a configuration without sense": sql("""UPDATE facts SET value = '{"peft_type": "REFT"}' WHERE key = 'config'"""),
    "a configuration of LoRA": sql("UPDATE facts SET value = replace(value, 'REFT', 'LORA') WHERE key = 'config'"),
    "a configuration nested too deeply": sql(f"UPDATE facts SET value = '{'[' * 9999}' WHERE key = 'config'"),
    "an id that is a path": sql("UPDATE facts SET value = '../x' WHERE key = 'id'"),
    "a shared part that is a path": sql("UPDATE facts SET value = '../../x' WHERE key = 'shared'"),
    "a shared part that is not there": sql(f"UPDATE facts SET value = '{'a' * 32}' WHERE key = 'shared'"),
    "a layout of other shapes": sql("UPDATE facts SET value = replace(value, '32', '31') WHERE key = 'layout'"),
    "a layout of negative shapes": sql("UPDATE facts SET value = replace(value, '32', '-32') WHERE key = 'layout'"),
    "a layout that is a list": sql("UPDATE facts SET value = '[1]' WHERE key = 'layout'"),
    "facts that are bytes": sql("UPDATE facts SET value = x'ff00' WHERE key = 'layout'"),
    "another user's row": sql("UPDATE users SET row = 1 WHERE name = 'anna'"),
    "another user's row and digest": sql(
        "UPDATE users SET (shard, row, digest) = (SELECT shard, row, digest FROM users WHERE name = 'bob') "
        "WHERE name = 'anna'"
    ),
    "a row that is not there": sql("UPDATE users SET row = 99999 WHERE name = 'anna'"),
    "a row before the first": sql("UPDATE users SET row = -1 WHERE name = 'anna'"),
    "a row that was never written": sql("UPDATE users SET row = 7 WHERE name = 'anna'"),
    "a row that is text": sql("UPDATE users SET row = 'x' WHERE name = 'anna'"),
    "a file that is not there": sql("UPDATE users SET shard = 9 WHERE name = 'anna'"),
    "a file's number below zero": sql("UPDATE users SET shard = -1 WHERE name = 'anna'"),
    "a file's number that is a path": sql("UPDATE users SET shard = '../x' WHERE name = 'anna'"),
    "a digest that is none": sql("UPDATE users SET digest = 'x' WHERE name = 'anna'"),
    "a shard that is cut off": shard_bytes(lambda raw: raw[:-1]),
    "a shard that is cut off in its header": shard_bytes(lambda raw: raw[:20]),
    "an empty shard": shard_bytes(lambda raw: b""),
    "a shard with more behind": shard_bytes(lambda raw: raw + b"x"),
    "a header of endless length": shard_bytes(lambda raw: b"\xff" * 8 + raw[8:]),
    "a header that is no JSON": shard_bytes(lambda raw: raw[:8] + b"x" + raw[9:]),
    "a header that is a list": header(lambda found: [1]),
    "a header of another dtype": header(each(dtype="I32")),
    "a header of another layout": header(lambda found: {k.replace("2", "1"): v for k, v in found.items()}),
    "a header with negative shapes": header(each(shape=[-64, -2])),
    "a header with fractions": header(each(shape=[64.0, 2, 32])),
    "a header whose tensors overlap": header(each(data_offsets=[0, 16384])),
    "a flipped bit": shard_bytes(lambda raw: raw[: 8 + int.from_bytes(raw[:8], "little")] + b"\1" + raw[-1 - len(raw) + 9 + int.from_bytes(raw[:8], "little") + 1 :]),
    "not a number": nan,
    "a shard of another store": other_stores_shard,
    "a shard from before": old_shard,
    "a shard that is gone": lambda store: (store.path / SHARD).unlink(),
    "a shard that is a link": link(SHARD),
    "an index that is a link": link(INDEX_FILE),
    "a journal that is a link": link(INDEX_FILE + "-journal"),
    "a shard that is a pipe": pipe,
    "a shard that is a folder": lambda store: ((store.path / SHARD).unlink(), (store.path / SHARD).mkdir()),
}  # fmt: skip


@pytest.mark.parametrize("how", TAMPERED)
@pytest.mark.parametrize("opened", ["before", "after"])
def test_a_tampered_store_is_refused_with_one_clear_error(tmp_path, how: str, opened: str) -> None:
    store = make_store(tmp_path)
    if opened == "before":
        store.read("anna")
    TAMPERED[how](store)
    if opened == "before":  # what is open already may still be read: then it is the right edit
        try:
            assert same(store.read("anna"), edit(1))
        except ReftuneError:
            pass
    with pytest.raises(ReftuneError) as caught:
        UserStore.open(store.path).read("anna")
    message = str(caught.value)
    assert "\n" not in message and (str(tmp_path) in message or "anna" in message), message
    with pytest.raises(ReftuneError):
        read_folded(store.path / "anna")
    try:  # the other user is as he was, or refused too
        found = UserStore.open(store.path).read("bob")
    except ReftuneError:
        found = edit(2)
    assert same(found, edit(2))


@pytest.mark.parametrize("how", TAMPERED)
def test_verify_names_what_is_broken(tmp_path, how: str) -> None:
    store = make_store(tmp_path)
    TAMPERED[how](store)
    try:
        problems = UserStore.open(store.path).verify()
    except ReftuneError as error:
        problems = [str(error)]
    assert problems and any("anna" in line or str(store.path) in line for line in problems)


def test_verify_names_the_user_that_is_broken_and_no_other(tmp_path) -> None:
    store = make_store(tmp_path)
    nan(store)
    assert [line for line in store.verify() if "'anna'" in line] == store.verify() and len(store.verify()) == 1
    store.write({"anna": edit(1)})
    assert store.verify() == [] and same(store.read("anna"), edit(1))


def test_a_file_of_a_user_that_is_cut_off_while_the_store_is_open_is_refused(tmp_path) -> None:
    store = make_store(tmp_path)
    store.read("anna")
    os.truncate(store.path / SHARD, 4096)
    with pytest.raises(ReftuneError, match="cut off"):
        store.read("anna")


def test_a_forged_store_gives_no_number_that_is_not_finite(tmp_path) -> None:
    """One that is consistent in itself: its digests are right for what it holds."""
    store = make_store(tmp_path)
    nan(store)
    shard = store._shard(1)
    digest = shard.digest("anna", shard.read(0, 1)[0])
    with sqlite3.connect(store.path / INDEX_FILE) as db:
        db.execute("UPDATE users SET digest = ? WHERE name = 'anna'", (digest,))
    db.close()
    with pytest.raises(ReftuneError, match="not finite"):
        store.read("anna")
    assert len(store.verify()) == 1


def test_a_place_in_a_store_is_no_path(tmp_path) -> None:
    store = make_store(tmp_path)
    found = user_of(store.path / "anna")
    assert found is not None and found[1] == "anna"
    assert user_of(tmp_path / "anna") is None
    with pytest.raises(ReftuneError, match="no user"):
        read_folded(store.path / "zoe")
    store.export("anna", tmp_path / "anna")
    for one, two in zip(read_folded(store.path / "anna").edits, read_folded(tmp_path / "anna").edits, strict=True):
        assert one.folded is not None and two.folded is not None and torch.equal(one.folded.A, two.folded.A)
