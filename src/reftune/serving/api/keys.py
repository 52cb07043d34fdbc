"""API keys: who may ask, which adapters they may use, and who may change what is served."""

from __future__ import annotations

import fnmatch
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from reftune.errors import ReftuneError
from reftune.serving.settings import KEYS

_SHORTEST = 8


@dataclass(frozen=True)
class Permission:
    """What a key allows.

    Attributes:
        adapters: patterns of names (``*`` and ``?``) of the models that may be used.
        admin: whether adapters may be added and removed.
        label: the first characters of the key's digest, for logs.
    """

    adapters: tuple[str, ...] = ("*",)
    admin: bool = False
    label: str = "-"

    def allows(self, name: str) -> bool:
        """Whether this key may use the model of this name."""
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.adapters)


class Keys:
    """The keys of a server; without any, everybody on this machine may ask and nobody may change what is served.

    A line holds a key, and after it, in any order: ``adapters=NAME,PATTERN,...`` and ``admin``. ``#`` begins a comment.
    Keys are kept and compared as digests.
    """

    def __init__(self, text: str = "", where: str = "keys"):
        self._by_digest: dict[bytes, Permission] = {}
        for number, line in enumerate(text.splitlines(), start=1):
            words = line.partition("#")[0].split()
            if words:
                self._add(words, f"{where}, line {number}")

    def _add(self, words: list[str], where: str) -> None:
        key, *options = words
        if len(key) < _SHORTEST:
            raise ReftuneError(f"{where}: a key has at least {_SHORTEST} characters.")
        adapters: tuple[str, ...] = ("*",)
        for option in options:
            if option.startswith("adapters="):
                adapters = tuple(name for name in option.removeprefix("adapters=").split(",") if name)
            elif option != "admin":
                raise ReftuneError(f"{where}: {option!r} is neither 'adapters=NAME,...' nor 'admin'.")
        digest = _digest(key)
        self._by_digest[digest] = Permission(adapters, "admin" in options, digest.hex()[:8])

    def __bool__(self) -> bool:
        return bool(self._by_digest)

    def permission(self, authorization: str | None) -> Permission | None:
        """What an ``Authorization`` header allows; None where the key is missing or wrong."""
        if not self:
            return Permission()
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            return None
        return self._by_digest.get(_digest(key.strip()))


def read_keys(path: str | Path | None, environment: Mapping[str, str] = os.environ) -> Keys:
    """The keys of a file, or of the variable ``REFTUNE_API_KEYS`` (the same lines, ``;`` may stand for a line's end).

    Raises:
        ReftuneError: a file that cannot be read, holds no key, or may be read by everybody.
    """
    if path is None:
        return Keys(environment.get(KEYS, "").replace(";", "\n"), KEYS)
    place = Path(path).expanduser()
    try:
        text = place.read_text(encoding="utf-8")
        public = os.name == "posix" and place.stat().st_mode & 0o004
    except (OSError, UnicodeDecodeError) as error:
        raise ReftuneError(f"--api-keys {place}: cannot be read ({error}).") from None
    if public:
        raise ReftuneError(f"--api-keys {place}: everybody on this machine can read it; run `chmod 600 {place}`.")
    keys = Keys(text, str(place))
    if not keys:
        raise ReftuneError(f"--api-keys {place}: holds no key; write one a line.")
    return keys


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
