"""Prompts from a file, and answers into one."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reftune.data.formats import Message
from reftune.data.reading import read_rows
from reftune.errors import ReftuneError

_TEXT = (".txt", ".text")


@dataclass(frozen=True)
class PromptRow:
    """A prompt (text, or the messages of a conversation) and the row that it came from."""

    prompt: Any
    row: Mapping[str, Any]


def read_prompts(path: str | Path, column: str = "prompt", limit: int | None = None) -> list[PromptRow]:
    """Read prompts: a .txt file has one a line; other files have them in `column` (or messages in `messages`).

    Raises:
        ReftuneError: naming file, row and column.
    """
    path = Path(path).expanduser()
    if path.suffix.lower() in _TEXT and path.is_file():
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise ReftuneError(f"{path} is not UTF-8: save it with that encoding.") from error
        found = [PromptRow(line.strip(), {"prompt": line.strip()}) for line in lines if line.strip()]
        if not found:
            raise ReftuneError(f"{path} holds no prompts: write one a line.")
        return found[:limit]
    rows = []
    for raw in read_rows(str(path))[:limit]:
        rows.append(PromptRow(_prompt_of(raw.values, column, raw.where), raw.values))
    return rows


def _prompt_of(values: Mapping[str, Any], column: str, where: str) -> Any:
    value = values.get(column)
    if value is None and column == "prompt":
        value = values.get("instruction", values.get("messages"))
        if "instruction" in values and str(values.get("input") or "").strip():
            value = f"{value}\n\n{values['input']}"
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, list) and value and all(isinstance(turn, Mapping) and "role" in turn for turn in value):
        turns = [Message(str(turn["role"]), str(turn.get("content", ""))) for turn in value]
        while turns and turns[-1].role == "assistant":
            turns.pop()  # what is to be written
        if turns:
            return turns
    names = ", ".join(map(str, values))
    if column not in values and value is None:
        raise ReftuneError(
            f"{where}: there is no column {column!r}; the columns are: {names}. Name yours with --column."
        )
    raise ReftuneError(f"{where}: {column!r} is empty; write a prompt or delete the row.")


def to_jsonl(rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows as JSON Lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
