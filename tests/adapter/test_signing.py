"""Signatures of folders: compared with OpenSSF's own program, and with the digests of `hashlib`."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from model_signing.signing import Config
from peft import PeftModel, get_peft_model
from typer.testing import CliRunner

import reftune
from reftune.adapter.signing import SIGNATURE_FILE, public_half, sign, verify
from reftune.cli import app
from reftune.errors import ReftuneError
from tests.tiny_models import TINY
from tests.users.test_hostile import make_store

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    config = reftune.ReftConfig(r=2, layers_to_transform=[1], positions="l1", init="paper", task_type="CAUSAL_LM")
    get_peft_model(TINY["llama"](), config).save_pretrained(str(tmp_path / "out"))
    return tmp_path / "out"


@pytest.fixture
def key(adapter: Path, tmp_path: Path) -> Path:
    """The key that `adapter` is signed with."""
    sign(adapter, tmp_path / "key.pem", new=True)
    return tmp_path / "key.pem"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run(*arguments: object, stdin: str | None = None) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(part) for part in arguments], input=stdin)
    return result.exit_code, " ".join(result.output.split())


def test_a_signature_lists_every_file_and_is_read_by_openssf(adapter: Path, key: Path) -> None:
    files = {name: data for name, data in contents(adapter).items() if name != SIGNATURE_FILE}
    assert verify(adapter, public_half(key)) == len(files) >= 2
    bundle = json.loads((adapter / SIGNATURE_FILE).read_bytes())
    statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    signed = {entry["name"]: entry["digest"] for entry in statement["predicate"]["resources"]}
    assert signed == {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    command = [sys.executable, "-m", "model_signing", "verify", "key", adapter, "--signature", adapter / SIGNATURE_FILE]
    subprocess.run([*command, "--public_key", public_half(key)], check=True, capture_output=True)


def test_the_private_key_is_its_owners_alone(key: Path) -> None:
    assert stat.S_IMODE(key.stat().st_mode) == 0o600


def test_what_openssf_signed_is_verified(adapter: Path, key: Path) -> None:
    (adapter / SIGNATURE_FILE).unlink()
    Config().use_elliptic_key_signer(private_key=key).sign(adapter, adapter / SIGNATURE_FILE)
    assert run("verify", adapter, "--public-key", public_half(key))[0] == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda out: (out / WEIGHTS).write_bytes((out / WEIGHTS).read_bytes()[:-1] + b"!"), f"'{WEIGHTS}' changed"),
        (lambda out: (out / "README.md").unlink(), "'README.md' missing"),
        (lambda out: (out / "deep").mkdir() or (out / "deep" / "more.py").touch(), "'deep/more.py' added"),
        (lambda out: (out / "a\nb").touch(), r"'a\nb' added"),
        (lambda out: (out / "README.md").unlink() or (out / "README.md").symlink_to("/etc/hostname"), "is a link"),
        (lambda out: os.mkfifo(out / "pipe"), "no ordinary file"),
        (lambda out: (out / SIGNATURE_FILE).unlink(), "is not signed"),
        (lambda out: (out / SIGNATURE_FILE).write_text("{}"), "damaged, or was made with another key"),
        (lambda out: (out / SIGNATURE_FILE).write_text("[" * 100_000), "damaged, or was made with another key"),
    ],
)  # fmt: skip
def test_a_folder_that_is_not_as_it_was_signed_is_refused(
    change: Callable, words: str, adapter: Path, key: Path
) -> None:
    change(adapter)
    status, said = run("verify", adapter, "--public-key", public_half(key))
    assert status == 2 and words in said and said.startswith("Error: ")


def test_a_statement_that_was_altered_is_refused(adapter: Path, key: Path) -> None:
    """The files and their digests agree; the key's owner signed others."""
    (adapter / WEIGHTS).write_bytes(b"evil")
    bundle = json.loads((adapter / SIGNATURE_FILE).read_bytes())
    payload = base64.b64decode(bundle["dsseEnvelope"]["payload"])
    other = adapter.parent / "other"
    shutil.copytree(adapter, other, ignore=lambda *_: [SIGNATURE_FILE])
    Config().use_elliptic_key_signer(private_key=key).sign(other, other / SIGNATURE_FILE)
    altered = json.loads((other / SIGNATURE_FILE).read_bytes())["dsseEnvelope"]["payload"]
    assert base64.b64decode(altered) != payload
    bundle["dsseEnvelope"]["payload"] = altered
    (adapter / SIGNATURE_FILE).write_text(json.dumps(bundle))
    with pytest.raises(ReftuneError, match="damaged, or was made with another key"):
        verify(adapter, public_half(key))


def test_a_signature_that_leaves_out_the_weights_is_refused(adapter: Path, key: Path) -> None:
    from model_signing.hashing import Config as Hashing

    without = Hashing().set_ignored_paths(paths=[WEIGHTS, SIGNATURE_FILE])
    Config().use_elliptic_key_signer(private_key=key).set_hashing_config(without).sign(
        adapter, adapter / SIGNATURE_FILE
    )
    with pytest.raises(ReftuneError, match=f"without {WEIGHTS}"):
        verify(adapter, public_half(key))


def test_git_and_the_hub_may_keep_notes_of_their_own(adapter: Path, key: Path) -> None:
    for name in (".git/config", ".gitattributes", ".cache/huggingface/download/README.md.metadata"):
        (adapter / name).parent.mkdir(parents=True, exist_ok=True)
        (adapter / name).touch()
    verify(adapter, public_half(key))


def test_another_key_and_a_key_in_the_folder_are_refused(adapter: Path, key: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter, tmp_path / "copy")
    sign(tmp_path / "copy", tmp_path / "other.pem", new=True)
    with pytest.raises(ReftuneError, match="another key than that of .*other.pem.pub"):
        verify(adapter, tmp_path / "other.pem.pub")
    with pytest.raises(ReftuneError, match="no public key"):
        verify(adapter, key)
    shutil.copy(public_half(key), adapter)
    with pytest.raises(ReftuneError, match="take the key from the signer"):
        verify(adapter, adapter / public_half(key).name)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "Give your key"), (["--private-key", "KEY", "--new-key", "new.pem"], "Give your key"),
        (["--private-key", "nowhere.pem"], "No such file"), (["--private-key", "KEY.pub"], "no private key"),
        (["--new-key", "KEY"], "is there already"), (["--new-key", "nowhere/k.pem"], "there is no folder nowhere"),
        (["--new-key", "out/k.pem"], "could sign in your name"),
    ],
)  # fmt: skip
def test_what_cannot_be_signed_changes_nothing(arguments, words: str, adapter: Path, key: Path, monkeypatch) -> None:
    monkeypatch.chdir(adapter.parent)
    before = contents(adapter.parent)
    status, said = run("sign", "out", *[one.replace("KEY", str(key)) for one in arguments])
    assert status == 2 and words in said
    assert contents(adapter.parent) == before


def test_a_folder_without_an_adapter_is_not_signed_and_no_key_is_made(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ReftuneError, match="has no adapter_config.json"):
        sign(tmp_path / "empty", tmp_path / "key.pem", new=True)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_an_encrypted_key_is_opened_by_its_password(adapter: Path, key: Path) -> None:
    from cryptography.hazmat.primitives import serialization as s

    plain = s.load_pem_private_key(key.read_bytes(), None)
    locked = s.BestAvailableEncryption(b"secret")
    key.write_bytes(plain.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, locked))
    before = contents(adapter)
    status, said = run("sign", adapter, "--private-key", key, stdin="wrong\n")
    assert status == 2 and "that this password opens" in said and contents(adapter) == before
    (adapter / SIGNATURE_FILE).unlink()
    assert run("sign", adapter, "--private-key", key, stdin="secret\n")[0] == 0
    verify(adapter, public_half(key))


def test_a_signed_folder_is_loaded_and_stays_as_it_was_signed(adapter: Path, key: Path) -> None:
    PeftModel.from_pretrained(TINY["llama"](), str(adapter))
    assert "model.sig; whether it fits" in run("info", adapter)[1]
    verify(adapter, public_half(key))
    (adapter / SIGNATURE_FILE).unlink()
    assert "signature none" in run("info", adapter)[1]


def test_a_store_is_signed_read_and_refused_after_a_change(tmp_path: Path) -> None:
    store, key = make_store(tmp_path), tmp_path / "key.pem"
    sign(store.path, key, new=True)
    store.read("anna")
    assert store.verify() == [] and "model.sig" in run("info", store.path)[1]
    verify(store.path, public_half(key))
    store.delete("bob")
    with pytest.raises(ReftuneError, match="'users.sqlite' changed"):
        verify(store.path, public_half(key))
    sign(store.path, key)
    verify(store.path, public_half(key))


def test_without_the_package_the_extra_is_named(adapter: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "model_signing", None)
    status, said = run("sign", adapter, "--new-key", tmp_path / "key.pem")
    assert status == 2 and "pip install 'reftune[sign]'" in said
    assert not (tmp_path / "key.pem").exists()
