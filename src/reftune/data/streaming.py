"""Training rows that are read while they are trained on: a file larger than memory, in a shuffled buffer."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

from torch.utils.data import IterableDataset

from reftune.data.formats import Example
from reftune.data.tokenising import Encoding
from reftune.errors import ReftuneError


class StreamedRows(IterableDataset[Any]):
    """Tokenised rows without end: the source from its first row to its last, again and again, each pass shuffled anew.

    A row is drawn from a buffer of the next ones, so that a row never comes much earlier than it stands, and only the
    buffer is held. The order is a function of the seed alone: a resumed run draws the same rows again and skips them.

    Args:
        source: where they come from.
        examples: gives the source's examples from the first on, in lists, each time it is called.
        encoding: how they become tokens.
        buffer: rows held; 1 keeps the order of the source.
        seed: of the run.
    """

    def __init__(
        self,
        source: str,
        examples: Callable[[], Iterator[list[Example]]],
        encoding: Encoding,
        buffer: int,
        seed: int,
    ) -> None:
        self.source = source
        self._examples, self._encoding, self._buffer, self._seed = examples, encoding, buffer, seed

    def digest(self) -> str:
        """Of the source's bytes; of its name where it is no file."""
        path = Path(self.source).expanduser()
        if not path.is_file():
            return self.source
        with path.open("rb") as file:
            digest = hashlib.blake2b(digest_size=16)
            while piece := file.read(1 << 20):
                digest.update(piece)
        return digest.hexdigest()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number in count():
            draw, held, any_row = random.Random(f"{self._seed} {number}"), [], False
            for row in self._pass():
                any_row = True
                if len(held) < self._buffer:
                    held.append(row)
                    continue
                index = draw.randrange(self._buffer)
                yield held[index]
                held[index] = row
            if not any_row:
                raise ReftuneError(f"{self.source} holds no rows: give at least one example")
            draw.shuffle(held)
            yield from held

    def _pass(self) -> Iterator[Any]:
        for examples in self._examples():
            yield from self._encoding.encoded(examples, Counter())
