"""`reftune store` and `reftune info` of a store."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from reftune.cli import app
from reftune.users.names import INDEX_FILE
from reftune.users.store import UserStore
from tests.users.test_hostile import make_store, nan
from tests.users.test_store import edit, same


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["store", *map(str, arguments)])
    return result.exit_code, result.output


def test_users_are_listed_exported_imported_and_deleted(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    status, said = run("list", store.path)
    assert status == 0 and {"anna", "bob"} <= set(said.split()) and "loreft, rank 2" in said
    assert json.loads(run("list", store.path, "--json")[1])["users"] == ["anna", "bob"]
    assert run("export", store.path, "anna", tmp_path / "out")[0] == 0
    assert run("import", tmp_path / "new", tmp_path / "out", "carl") == (0, f"Imported {tmp_path / 'out'} as 'carl'.\n")
    assert run("import", tmp_path / "new", tmp_path / "out", "--json") == (0, '{"imported": "out"}\n')
    assert same(UserStore.open(tmp_path / "new").read("out"), edit(1))
    assert run("delete", store.path, "bob")[0] == 0 and store.names() == ["anna"]
    result = CliRunner().invoke(app, ["info", str(tmp_path / "new")])
    assert result.exit_code == 0 and "2, 1,040 bytes each" in result.output and "tiny" in result.output


def test_verify_says_which_user_is_broken(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    assert run("verify", store.path) == (0, "2 users are as they were written.\n")
    nan(store)
    status, said = run("verify", store.path, "--json")
    assert status == 2 and len(json.loads(said)["problems"]) == 1 and "'anna'" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["burn", "STORE"], "say one of list"), (["list", "nowhere"], "no store of users"),
        (["list", "STORE", "more"], "takes nothing more"), (["export", "STORE"], "takes 1 to 2 arguments"),
        (["delete", "STORE"], "at least one name"), (["delete", "STORE", "anna", "zoe"], "no user 'zoe'"),
        (["export", "STORE", "../anna", "out"], "a name has"), (["export", "STORE", "anna", "STORE"], "what is read"),
        (["import", "STORE", "nowhere"], "not a folder"), (["import", "fresh", "nowhere"], "not a folder"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_told_and_changes_nothing(arguments, words: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = make_store(tmp_path)
    before = (store.path / INDEX_FILE).read_bytes()
    status, said = run(*[str(store.path) if one == "STORE" else one for one in arguments])
    assert status == 2 and words in " ".join(said.split())
    assert (store.path / INDEX_FILE).read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store"]
