"""Read CSV, TSV, JSON, JSONL, Parquet, a saved or Hub dataset, or rows in memory into numbered raw rows.

Row numbers are those a reader of the file sees: in CSV and TSV the header is row 1, as in a spreadsheet; in JSONL the
row is the line; in JSON, Parquet and datasets the first row is 1.
"""

import csv
import difflib
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reftune.errors import ReftuneError

Source = Any
"""A path, a Hub name ("owner/name" or "owner/name:config"), a `datasets.Dataset`, or an iterable of mappings."""

_LIST_KEYS = ("data", "rows", "examples", "train")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")


@dataclass(frozen=True)
class RawRow:
    """One row as read: its source and number (for messages) and its values by column."""

    source: str
    number: int
    values: Mapping[str, Any]

    @property
    def where(self) -> str:
        """`file, row 3`."""
        return f"{self.source}, row {self.number}"


def read_rows(source: Source, *, split: str = "train") -> list[RawRow]:
    """Return every row of `source`, which is never empty.

    Args:
        source: a file (.csv, .tsv, .json, .jsonl, .ndjson, .parquet), a folder written by `Dataset.save_to_disk`, a Hub
            dataset name, a `datasets.Dataset` or `DatasetDict`, or an iterable of mappings.
        split: the split to take where the source has several.

    Raises:
        ReftuneError: the source is missing, empty, of an unknown kind, or broken; the message names file and row.
    """
    if isinstance(source, (str, Path)):
        name = str(source)
        rows = _read_path(name, split)
    else:
        name = "rows in memory"
        rows = _read_memory(source, name, split)
    if not rows:
        raise ReftuneError(f"{name} holds no rows: give at least one example")
    return rows


def _read_path(name: str, split: str) -> list[RawRow]:
    path = Path(name).expanduser()
    reader = _READERS.get(path.suffix.lower())
    if path.is_dir():
        return _read_folder(path, split)
    if not path.exists():
        if reader is None and _HUB_NAME.fullmatch(name):
            return _read_hub(name, split)
        raise ReftuneError(f"{name}: there is no such file{_near(path)}")
    if reader is None:
        raise ReftuneError(f"{name}: extension {path.suffix!r} is not read; convert it to one of {', '.join(_READERS)}")
    if path.stat().st_size == 0:
        raise ReftuneError(f"{name} is empty (0 bytes)")
    return list(reader(path))


def _near(path: Path) -> str:
    try:
        names = [entry.name for entry in path.parent.iterdir() if entry.suffix.lower() in _READERS]
    except OSError:
        return f"; the folder {path.parent} does not exist either"
    close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(close)}?" if close else f"; the folder {path.parent.resolve()} was searched"


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ReftuneError(f"{path} cannot be read: {error.strerror or error}") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ReftuneError(
            f"{path}, line {line}: byte 0x{data[error.start]:02x} is not UTF-8; save the file with UTF-8 encoding"
        ) from error


def _read_csv(path: Path) -> Iterator[RawRow]:
    yield from _read_delimited(path, ",")


def _read_tsv(path: Path) -> Iterator[RawRow]:
    yield from _read_delimited(path, "\t")


def _read_delimited(path: Path, delimiter: str) -> Iterator[RawRow]:
    # The default limit of 131,072 characters a field is process-wide, so it is raised only while this file is parsed.
    limit = csv.field_size_limit(sys.maxsize if sys.maxsize < 2**31 else 2**31 - 1)
    # Lines are cut at line feeds alone: str.splitlines would also cut at form feeds and U+2028 inside a quoted field.
    reader = csv.reader(re.findall(r"[^\n]*\n|[^\n]+\Z", _text(path)), delimiter=delimiter, strict=True)
    try:
        records = list(reader)
    except csv.Error as error:
        raise ReftuneError(f"{path}, line {reader.line_num}: {error}; check the quotes around that field") from error
    finally:
        csv.field_size_limit(limit)
    header = [column.strip() for column in records[0]] if records else []
    if not any(header):
        raise ReftuneError(f"{path}, row 1 is blank: the first row names the columns, e.g. prompt{delimiter}completion")
    repeated = sorted({column for column in header if header.count(column) > 1})
    if repeated:
        raise ReftuneError(f"{path}, row 1 names column {repeated[0]!r} twice: rename one of the two")
    if len(header) == 1 and (other := next((mark for mark in ";\t," if mark in header[0]), None)):
        raise ReftuneError(
            f"{path}, row 1: one column named {header[0]!r}: fields seem to be separated by {other!r}, "
            f"not {delimiter!r}; save as .csv with commas or .tsv with tabs"
        )
    for number, record in enumerate(records[1:], start=2):
        if not record:
            continue  # a blank line
        if len(record) != len(header):
            raise ReftuneError(
                f"{path}, row {number}: {len(record)} fields where the header has {len(header)}; "
                "put quotes around text that contains the separator"
            )
        yield RawRow(str(path), number, dict(zip(header, record, strict=True)))


def _read_json(path: Path) -> Iterator[RawRow]:
    text = _text(path)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip().startswith("{"):
            yield from _read_jsonl(path)  # JSON Lines under the name .json is common
            return
        raise ReftuneError(
            f"{path}: not valid JSON at line {error.lineno}, column {error.colno}: {error.msg}"
        ) from error
    if isinstance(value, dict):
        lists = [key for key in _LIST_KEYS if isinstance(value.get(key), list)]
        value = value[lists[0]] if lists else [value]
    if not isinstance(value, list):
        raise ReftuneError(f"{path} holds a JSON {type(value).__name__}; give a list of objects")
    for number, item in enumerate(value, start=1):
        yield RawRow(str(path), number, _mapping(item, f"{path}, row {number}"))


def _read_jsonl(path: Path) -> Iterator[RawRow]:
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except json.JSONDecodeError as error:
            raise ReftuneError(f"{path}: not valid JSON at line {number}, column {error.colno}: {error.msg}") from error
        yield RawRow(str(path), number, _mapping(item, f"{path}, row {number}"))


def _read_parquet(path: Path) -> Iterator[RawRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ReftuneError(f"{path} cannot be read as Parquet: {str(error).splitlines()[0]}") from error
    yield from (RawRow(str(path), number, row) for number, row in enumerate(rows, start=1))


_READERS: dict[str, Callable[[Path], Iterator[RawRow]]] = {
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".parquet": _read_parquet,
}


def _read_folder(path: Path, split: str) -> list[RawRow]:
    if not any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        raise ReftuneError(f"{path} is a folder, and not one written by Dataset.save_to_disk: name a file inside it")
    import datasets

    return _read_memory(datasets.load_from_disk(str(path)), str(path), split)


def _read_hub(name: str, split: str) -> list[RawRow]:
    import datasets

    dataset, _, config = name.partition(":")
    try:
        loaded = datasets.load_dataset(dataset, config or None)
    except Exception as error:  # hub, network and builder errors share no base class
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ReftuneError(
            f"{name} is neither a file here nor a dataset that could be fetched from the Hub ({reason}): "
            "check the spelling, the working folder or the connection"
        ) from error
    return _read_memory(loaded, name, split)


def _read_memory(source: Any, name: str, split: str) -> list[RawRow]:
    import datasets

    if isinstance(source, Mapping) and isinstance(source, (datasets.DatasetDict, datasets.IterableDatasetDict)):
        if split not in source:
            raise ReftuneError(f"split={split!r}: {name} has the splits {', '.join(map(str, source))}")
        source = source[split]
    if isinstance(source, Mapping) or not isinstance(source, Iterable):
        raise ReftuneError(
            f"cannot read rows from a {type(source).__name__}: give a path, a Dataset or a list of dicts"
        )
    numbered = enumerate(source, start=1)
    return [RawRow(name, number, _mapping(item, f"{name}, row {number}")) for number, item in numbered]


def _mapping(item: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(item, Mapping):
        raise ReftuneError(f"{where} is a {type(item).__name__}; every row is an object with named fields")
    return item
