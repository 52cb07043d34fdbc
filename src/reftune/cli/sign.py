"""`reftune sign` and `reftune verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from reftune.errors import ReftuneError
from reftune.output import terminal

_Signed = Annotated[Path, typer.Argument(metavar="DIR", help="Adapter folder, or a store of users.")]


def sign(
    folder: _Signed,
    private_key: Annotated[
        Path | None, typer.Option(metavar="KEY", help="PEM file of your elliptic curve key (P-256, P-384, P-521).")
    ] = None,
    new_key: Annotated[
        Path | None,
        typer.Option(metavar="KEY", help="Make such a key first: KEY, for you alone, and KEY.pub, for everybody."),
    ] = None,
) -> None:
    """Sign every file of a folder with your key, into its model.sig (OpenSSF model-signing)."""
    if (key := private_key or new_key) is None or (private_key and new_key):
        raise ReftuneError("Give your key as --private-key KEY, or let --new-key KEY make one.")
    from reftune.adapter.signing import SIGNATURE_FILE, public_half
    from reftune.adapter.signing import sign as sign_folder

    encrypted = private_key is not None and b"ENCRYPTED" in private_key.expanduser().read_bytes()
    password = typer.prompt(f"Password of {private_key}", hide_input=True, err=True) if encrypted else None
    count = sign_folder(folder, key, password, new=new_key is not None)
    told = f"Signed {count} files: {folder / SIGNATURE_FILE}."
    if new_key:
        told += f"\nKeep {new_key} to yourself; whoever has {public_half(new_key)} can verify what you sign."
    terminal.console().print(told, markup=False, highlight=False, soft_wrap=True)


def verify(
    folder: _Signed,
    public_key: Annotated[
        Path, typer.Option(metavar="KEY", help="PEM file of the signer's public key, which you got from the signer.")
    ],
) -> None:
    """Whether a folder is, file by file, what the owner of a key has signed."""
    from reftune.adapter.signing import verify as verify_folder

    count = verify_folder(folder, public_key)
    told = f"{folder}: {count} files are as they were signed with the key of {public_key}."
    terminal.console().print(told, markup=False, highlight=False, soft_wrap=True)
