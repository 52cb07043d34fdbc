"""Signatures of adapter folders and stores with a key of one's own, in the format of OpenSSF's model-signing.

::

    sign("out", "key.pem", new=True)    # makes key.pem and key.pem.pub, and writes out/model.sig
    verify("out", "key.pem.pub")        # a ReftuneError names the file that is not as it was signed

`model.sig` is a Sigstore bundle: an in-toto statement with the SHA-256 of every file, signed by ECDSA. The program
``model_signing verify key`` reads it as well (https://github.com/sigstore/model-transparency).
"""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path
from typing import Any

from reftune.adapter.info import read_adapter_info
from reftune.errors import ReftuneError
from reftune.output.files import replaced
from reftune.output.locks import refuse_if_locked
from reftune.users.names import is_store

SIGNATURE_FILE = "model.sig"
_LEFT_OUT = (SIGNATURE_FILE, ".cache/huggingface")
"""What is not signed, beside Git's own files: the signature, and what `hf download` notes in a folder."""
_GIT = (".git", ".gitattributes", ".github", ".gitignore")
_KEYS = "of an elliptic curve (P-256, P-384 or P-521) as PEM"
_SHOWN = 3


def signature_state(folder: Path) -> str:
    """What can be said of a folder's signature without a key."""
    if not (folder / SIGNATURE_FILE).is_file():
        return "none"
    return f"{SIGNATURE_FILE}; whether it fits: reftune verify {folder} --public-key KEY"


def public_half(private_key: Path) -> Path:
    """Where ``sign`` writes the public half of a key that it makes."""
    return private_key.with_name(f"{private_key.name}.pub")


def sign(folder: str | Path, private_key: str | Path, password: str | None = None, new: bool = False) -> int:
    """Sign every file of an adapter's folder, or of a store of users; **replaces its** ``model.sig``.

    Args:
        folder: an adapter or store that loading would accept.
        private_key: PEM file of an elliptic curve key, outside of the folder.
        password: of a key that is encrypted.
        new: make the key first, and its public half beside it (``KEY.pub``).

    Returns:
        How many files were signed.

    Raises:
        ReftuneError: no adapter or store there, a link in it, a run that is writing it, or a key that is none, lies in
            the folder or, to be made, is there already. Nothing is changed then.
    """
    named, key = Path(folder).expanduser(), Path(private_key).expanduser()
    place = _ordinary_files(named)
    if is_store(named):
        from reftune.users.store import UserStore

        UserStore.open(named)
    else:
        read_adapter_info(named)
    refuse_if_locked(named)
    _refuse_inside(place, key, "whoever gets the folder could sign in your name")
    if not new:
        return _signed(place, key, password)
    public = public_half(key)
    if not key.parent.is_dir():
        raise ReftuneError(f"{key}: there is no folder {key.parent}; make it, or name another place.")
    for path in (key, public):
        if os.path.lexists(path):
            raise ReftuneError(f"{path} is there already: sign with it (--private-key), or name a new file.")
    _library()
    with replaced(key) as secret, replaced(public) as shown:
        _write_pair(secret, shown)
        return _signed(place, secret, None)


def verify(folder: str | Path, public_key: str | Path) -> int:
    """Make sure that a folder is, file by file, what the owner of a key has signed.

    Args:
        folder: a folder with a ``model.sig``.
        public_key: PEM file of the signer's public key, from elsewhere than the folder.

    Returns:
        How many files were compared.

    Raises:
        ReftuneError: no signature, one of another key or damaged, or a file that was changed, removed or added.
    """
    named, key = Path(folder).expanduser(), Path(public_key).expanduser()
    place = _ordinary_files(named)
    signature = place / SIGNATURE_FILE
    if not signature.is_file():
        raise ReftuneError(f"{named} is not signed: it has no {SIGNATURE_FILE}.")
    _refuse_inside(place, key, "it says nothing of who signed; take the key from the signer")
    _, hashing, verifying = _library()
    try:
        verifier = verifying.Config().use_elliptic_key_verifier(public_key=key)
    except OSError:
        raise
    except Exception:
        raise ReftuneError(f"{key} is no public key {_KEYS}.") from None
    forged = ReftuneError(f"{named / SIGNATURE_FILE} is damaged, or was made with another key than that of {key}.")
    try:
        statement = _statement(signature)
        method = statement["serialization"]
        signed = {entry["name"]: entry["digest"] for entry in statement["resources"]}
        left_out = set(method.get("ignore_paths") or ()) - {*_LEFT_OUT, *_GIT}
    except Exception:
        raise forged from None
    if (method.get("method"), method.get("hash_type")) != ("files", "sha256") or left_out:
        how = (
            f"without {', '.join(sorted(map(str, left_out)))}" if left_out else "by other digests than SHA-256 of files"
        )
        raise ReftuneError(f"{named / SIGNATURE_FILE} signs the folder {how}; have it signed with `reftune sign`.")

    class Compared(hashing.Config):
        """Keeps what the folder holds; it is asked for that once the signature itself is found to be the key's."""

        manifest: Any = None

        def hash(self, *args: Any, **kwargs: Any) -> Any:
            self.manifest = super().hash(*args, **kwargs)
            return self.manifest

    compared = Compared().set_ignored_paths(paths=_LEFT_OUT)
    try:
        verifier.set_hashing_config(compared).verify(place, signature)
    except OSError:
        raise
    except Exception:
        if compared.manifest is None:
            raise forged from None
        found = {entry.identifier: entry.digest.digest_hex for entry in compared.manifest.resource_descriptors()}
        raise ReftuneError(f"{named} is not as it was signed: {_difference(signed, found)}.") from None
    return len(signed)


def _signed(place: Path, key: Path, password: str | None) -> int:
    signing, hashing, _ = _library()
    try:
        secret: Any = password.encode() if password else None
        signer = signing.Config().use_elliptic_key_signer(private_key=key, password=secret)
    except OSError:
        raise
    except Exception:
        why = " that this password opens" if password else ""
        raise ReftuneError(f"{key} is no private key {_KEYS}{why}; --new-key KEY makes one.") from None
    signature = place / SIGNATURE_FILE
    with replaced(signature) as partial:
        signer.set_hashing_config(hashing.Config().set_ignored_paths(paths=_LEFT_OUT)).sign(place, partial)
        return len(_statement(partial)["resources"])


def _library() -> tuple[Any, Any, Any]:
    try:
        from model_signing import hashing, signing, verifying
    except ImportError as error:
        raise ReftuneError(f"signatures need model-signing ({error}): run `pip install 'reftune[sign]'`.") from None
    return signing, hashing, verifying


def _ordinary_files(folder: Path) -> Path:
    """The folder with no link in its own path, and none in it."""
    if not folder.is_dir():
        raise ReftuneError(f"{folder} is not a folder; give an adapter's, or a store of users.")
    for path in folder.rglob("*"):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise ReftuneError(
                f"{path} is a link or no ordinary file, whose contents nobody can sign for: put the file itself there "
                "(`hf download REPO --local-dir DIR` does)."
            )
    return folder.resolve()


def _refuse_inside(place: Path, key: Path, why: str) -> None:
    if key.resolve().is_relative_to(place):
        raise ReftuneError(f"{key} lies in the folder that it is the key of: {why}.")


def _write_pair(private_key: Path, public_key: Path) -> None:
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

    pair = ec.generate_private_key(ec.SECP256R1())
    private_key.touch(0o600)
    private_key.write_bytes(pair.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public_key.write_bytes(pair.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))


def _statement(signature: Path) -> dict[str, Any]:
    """What a signature says was signed, as in-toto's predicate: nobody has compared it with a key yet."""
    bundle = json.loads(signature.read_text(encoding="utf-8"))
    return json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))["predicate"]


def _difference(signed: dict[str, str], found: dict[str, str]) -> str:
    told = []
    for what, names in (
        ("changed", [name for name in signed if name in found and signed[name] != found[name]]),
        ("missing", [name for name in signed if name not in found]),
        ("added", [name for name in found if name not in signed]),
    ):
        if names:
            told.append(f"{', '.join(map(repr, sorted(names)[:_SHOWN]))}{', ...' if names[_SHOWN:] else ''} {what}")
    return "; ".join(told)
