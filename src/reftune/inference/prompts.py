"""Prompts from a file, and answers into one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reftune.data import formats
from reftune.data.formats import Example, Message
from reftune.data.reading import read_rows, read_text
from reftune.data.values import check_text, json_text
from reftune.errors import ReftuneError

_TEXT = (".txt", ".text")


@dataclass(frozen=True)
class PromptRow:
    """A prompt, an example whose answer is to be written, and the row that it came from."""

    prompt: Example
    row: Mapping[str, Any]

    @property
    def messages(self) -> tuple[Message, ...]:
        """The turns of the prompt."""
        return self.prompt.messages

    @property
    def shown(self) -> str:
        """The prompt as people are shown it: the last turn."""
        return self.prompt.messages[-1].content


def read_prompts(
    path: str | Path,
    column: str | None = None,
    limit: int | None = None,
    usual: Mapping[str, str] | None = None,
) -> list[PromptRow]:
    """Read prompts as training reads them; a .txt file has one a line.

    Args:
        path: a file, or what else `reading.read_rows` takes.
        column: the one that holds them (texts, or lists of messages); None finds out.
        limit: only the first rows.
        usual: training's columns by field, used where the file has them.

    Raises:
        ReftuneError: naming file, row and column.
    """
    if Path(path).suffix.lower() in _TEXT and Path(path).expanduser().is_file():
        return [text_prompt(text, where) for text, where in _lines(Path(path).expanduser())][:limit]
    rows = read_rows(str(path))[:limit]
    prompts = formats.read_prompts(rows, columns=None if column is None else {"prompt": column}, usual=usual)
    return [PromptRow(prompt, row.values) for prompt, row in zip(prompts, rows, strict=True)]


def text_prompt(text: str, where: str) -> PromptRow:
    """A user's message as a prompt.

    Raises:
        ReftuneError: it is empty, or no Unicode.
    """
    if not text.strip():
        raise ReftuneError(f"{where} is empty: write a prompt.")
    return PromptRow(Example((Message("user", check_text(text, where)),), ""), {"prompt": text})


def to_jsonl(rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows as JSON Lines."""
    return "".join(json_text(row) + "\n" for row in rows)


def _lines(path: Path) -> list[tuple[str, str]]:
    """The lines of a text file that are not blank, each with its place; only a line feed ends a line."""
    numbered = enumerate(read_text(path).split("\n"), start=1)
    lines = [(line.strip(" \t\r"), f"{path}, line {number}") for number, line in numbered if line.strip()]
    if not lines:
        raise ReftuneError(f"{path} holds no prompts: write one a line.")
    return lines
