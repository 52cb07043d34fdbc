"""Per-example results as JSON Lines, written as they come, so that an interrupted evaluation goes on where it stopped.

Beside `NAME.jsonl` lies `NAME.settings.json`, which says what the results are results of. The next run with the same
settings reads what is there and does the rest; with other settings it refuses, and names what differs.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from reftune.errors import ReftuneError
from reftune.output.files import write_text
from reftune.output.json_files import read_json_object
from reftune.runs.output_folder import readable_disk_errors


class ResultFile:
    """The results of one task and one model.

    Args:
        folder: where they lie; None keeps them in memory alone.
        name: the files' stem.
        settings: everything that decides a result (JSON values).

    Raises:
        ReftuneError: there are results of other settings, or the folder cannot be written.
    """

    def __init__(self, folder: Path | None, name: str, settings: Mapping[str, Any]) -> None:
        self.path = None if folder is None else folder / f"{name}.jsonl"
        self.records: dict[int, dict[str, Any]] = {}
        if folder is None or self.path is None:
            return
        told = folder / f"{name}.settings.json"
        with readable_disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            if told.is_file() and self.path.is_file():
                _check_same(read_json_object(told, "give another --out"), settings, self.path)
                self.records = _read(self.path)
            else:
                self.path.unlink(missing_ok=True)
            write_text(told, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
            # A line that was cut off by the interruption would otherwise run into the next one.
            self._rewrite()

    def add(self, records: Iterable[tuple[int, dict[str, Any]]]) -> None:
        """Append results, by their row's index; they are on disk when this returns."""
        fresh = dict(records)
        self.records |= fresh
        if self.path is not None:
            with readable_disk_errors(self.path.parent), self.path.open("a", encoding="utf-8") as file:
                file.write("".join(_line(index, record) for index, record in fresh.items()))

    def finish(self) -> list[dict[str, Any]]:
        """Put the file into the rows' order.

        Returns:
            The results, in that order.
        """
        self.records = dict(sorted(self.records.items()))
        if self.path is not None:
            with readable_disk_errors(self.path.parent):
                self._rewrite()
        return list(self.records.values())

    def _rewrite(self) -> None:
        assert self.path is not None
        write_text(self.path, "".join(_line(index, record) for index, record in self.records.items()))


def _line(index: int, record: Mapping[str, Any]) -> str:
    return json.dumps({"row": index, **record}, ensure_ascii=False) + "\n"


def _read(path: Path) -> dict[int, dict[str, Any]]:
    records: dict[int, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            record = json.loads(line)
            records[int(record.pop("row"))] = record
        except (ValueError, RecursionError, AttributeError, KeyError, TypeError):
            continue  # the end of an interrupted write, the empty string after the last line, or no result of ours
    return records


def _check_same(before: Mapping[str, Any], now: Mapping[str, Any], path: Path) -> None:
    now = json.loads(json.dumps(now))
    changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if changed:
        detail = "; ".join(f"{name}: {_short(before.get(name))}, now {_short(now.get(name))}" for name in changed)
        raise ReftuneError(
            f"{path} holds results of other settings ({detail}): give another --out, or delete that file to start again"
        )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."
