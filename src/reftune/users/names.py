"""What a user may be called, and how a store is known by its files; imports nothing heavy."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Any

from reftune.errors import ReftuneError

INDEX_FILE = "users.sqlite"
_BASE_ROW = "__base__"


def is_name(name: str) -> bool:
    """Whether a text can be an adapter's name: it is no path, is printable, and is not too long."""
    return (
        0 < len(name) <= 128
        and name.isprintable()
        and name[0] not in ". "
        and not any(mark in name for mark in "/\\:*")
    )


def check_user_name(name: Any) -> str:
    """A user's name, checked: the one rule for training, stores and serving.

    Raises:
        ReftuneError: not text; a path, or a name that files or servers give a meaning; characters that are not seen;
            more than 128 characters or 255 bytes; not in composed form (NFC), so that it may look like another's.
    """
    if not isinstance(name, str):
        raise ReftuneError(f"user {name!r}: a name is text, not {type(name).__name__}.")
    shown = name if len(name) <= 128 else f"{name[:40]}..."
    if not is_name(name) or name[-1] in ". " or name == _BASE_ROW or len(name.encode()) > 255:
        raise ReftuneError(
            f"user {shown!r}: a name has 1 to 128 characters that can be seen (255 bytes), none of / \\ : *, does not "
            f"begin or end with a dot or a space, and is not {_BASE_ROW}; rename the user."
        )
    if (composed := unicodedata.normalize("NFC", name)) != name:
        raise ReftuneError(
            f"user {name!r} is not in composed form (Unicode NFC), in which it is {composed!r}: two names that look "
            "alike would be two users. Normalise the names."
        )
    return name


def looks(name: str) -> str:
    """What two names have in common that people may take for one another."""
    return unicodedata.normalize("NFKC", name).casefold()


def is_store(folder: Path) -> bool:
    """Whether a folder is a store of users, as far as its file names say."""
    return (folder / INDEX_FILE).is_file()
