"""Read CSV, TSV, JSON, JSONL, Parquet, a saved or Hub dataset, or rows in memory into numbered raw rows.

Values are as `values.plain` has them. Row numbers are those a reader of the file sees: in CSV and TSV the header is
row 1, as in a spreadsheet; in JSONL the row is the line; in JSON, Parquet and datasets the first row is 1.
"""

import csv
import difflib
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from reftune.data.values import check_text, parse_json, plain
from reftune.errors import ReftuneError
from reftune.output.targets import refuse_dangling

Source = Any
"""A path, a Hub name ("owner/name" or "owner/name:config"), a `datasets.Dataset`, a DataFrame or other table, lists by
column, or an iterable of mappings."""

_MISSING = ("NaN", "nan", "<NA>", "NaT")
"""How pandas and numpy write a value that is missing."""
_LIST_KEYS = ("data", "rows", "examples", "train")
_ENCLOSED = re.compile(r'"(?:[^"]|"")*"')
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
            dataset name, a `datasets.Dataset` or `DatasetDict`, a DataFrame, lists by column, or mappings.
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


def stream_rows(source: str, *, split: str = "train") -> Iterator[RawRow]:
    """Rows one after another, of which few are held at a time.

    Args:
        source: a .jsonl, .ndjson or .parquet file, or a Hub dataset name.
        split: the split of a Hub dataset.

    Raises:
        ReftuneError: as for `read_rows`, at the row where it is met; or a file that cannot be read in pieces.
    """
    path = Path(source).expanduser()
    suffix = path.suffix.lower()
    if not path.exists() and suffix not in _READERS and _HUB_NAME.fullmatch(source):
        rows = _load_hub(source, streaming=True)
        if split not in rows:
            raise ReftuneError(f"split={split!r}: {source} has the splits {', '.join(map(str, rows))}")
        for number, item in enumerate(rows[split], start=1):
            yield RawRow(source, number, _mapping(item, f"{source}, row {number}"))
    elif not path.exists():
        refuse_dangling(path)
        raise ReftuneError(f"{source}: there is no such file{_near(path)}")
    elif suffix in (".jsonl", ".ndjson"):
        try:
            with path.open(encoding="utf-8-sig", newline="\n") as lines:
                yield from _jsonl_rows(path, lines)
        except UnicodeDecodeError:
            read_text(path)  # says in which line
            raise
    elif suffix == ".parquet":
        yield from _parquet_rows(path, whole=False)
    else:
        raise ReftuneError(f"{source}: rows are streamed from .jsonl or .parquet; convert it, or leave out streaming")


def _read_path(name: str, split: str) -> list[RawRow]:
    path = Path(name).expanduser()
    reader = _READERS.get(path.suffix.lower())
    if path.is_dir():
        return _read_folder(path, split)
    if not path.exists():
        refuse_dangling(path)
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


def read_text(path: Path) -> str:
    """A file's text.

    Raises:
        ReftuneError: it cannot be read, or is not UTF-8; the message names the line.
    """
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
    yield from _delimited_rows(path, ",", _records(path, read_text(path), ","))


def _read_tsv(path: Path) -> Iterator[RawRow]:
    text = read_text(path)
    quoting = csv.QUOTE_MINIMAL if _quotes_enclose(path, text) else csv.QUOTE_NONE
    yield from _delimited_rows(path, "\t", _records(path, text, "\t", quoting))


def _quotes_enclose(path: Path, text: str) -> bool:
    """Whether quotes in a TSV file stand around fields, as spreadsheets write them, or are text, as in GLUE's files."""
    lines = [line.rstrip("\r").split("\t") for line in text.split("\n") if line.strip()]
    marked = [field for line in lines for field in line if '"' in field]
    if not marked:
        return False
    if all(_ENCLOSED.fullmatch(field) for field in lines[0]):
        return True  # a writer that encloses every text
    if all(len(line) == len(lines[0]) for line in lines):
        return all(_ENCLOSED.fullmatch(field) and '""' in field[1:-1] for field in marked)
    try:  # tabs and line feeds are inside fields only where quotes enclose those
        return len({len(record) for record in _records(path, text, "\t") if record}) == 1
    except ReftuneError:
        return False


def _records(path: Path, text: str, delimiter: str, quoting: int = csv.QUOTE_MINIMAL) -> list[list[str]]:
    # The default limit of 131,072 characters a field is process-wide, so it is raised only while this file is parsed.
    limit = csv.field_size_limit(sys.maxsize if sys.maxsize < 2**31 else 2**31 - 1)
    # Lines are cut at line feeds alone: str.splitlines would also cut at form feeds and U+2028 inside a quoted field.
    lines = re.findall(r"[^\n]*\n|[^\n]+\Z", text)
    reader = csv.reader(lines, delimiter=delimiter, strict=True, quoting=cast("Any", quoting))
    try:
        return list(reader)
    except csv.Error as error:
        raise ReftuneError(f"{path}, line {reader.line_num}: {error}; check the quotes around that field") from error
    finally:
        csv.field_size_limit(limit)


def _delimited_rows(path: Path, delimiter: str, records: list[list[str]]) -> Iterator[RawRow]:
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
        cells = (None if cell.strip() in _MISSING else cell for cell in record)
        yield RawRow(str(path), number, dict(zip(header, cells, strict=True)))


def _read_json(path: Path) -> Iterator[RawRow]:
    text = read_text(path)
    try:
        value = parse_json(text, str(path))
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip().startswith("{"):
            yield from _read_jsonl(path)  # JSON Lines under the name .json is common
            return
        raise ReftuneError(
            f"{path}: not valid JSON at line {error.lineno}, column {error.colno}: {error.msg}"
        ) from error
    if isinstance(value, dict):
        lists = [key for key in _LIST_KEYS if isinstance(value.get(key), list)]
        value = value[lists[0]] if lists else _columns(value, str(path)) or [value]
    if not isinstance(value, list):
        raise ReftuneError(f"{path} holds a JSON {type(value).__name__}; give a list of objects")
    for number, item in enumerate(value, start=1):
        yield RawRow(str(path), number, _mapping(item, f"{path}, row {number}"))


def _read_jsonl(path: Path) -> Iterator[RawRow]:
    yield from _jsonl_rows(path, read_text(path).split("\n"))


def _jsonl_rows(path: Path, lines: Iterable[str]) -> Iterator[RawRow]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            item = parse_json(line.rstrip("\r\n"), f"{path}, row {number}")
        except json.JSONDecodeError as error:
            raise ReftuneError(f"{path}: not valid JSON at line {number}, column {error.colno}: {error.msg}") from error
        yield RawRow(str(path), number, _mapping(item, f"{path}, row {number}"))


def _read_parquet(path: Path) -> Iterator[RawRow]:
    yield from _parquet_rows(path, whole=True)


def _parquet_rows(path: Path, whole: bool) -> Iterator[RawRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        tables = [pyarrow.parquet.read_table(path)] if whole else pyarrow.parquet.ParquetFile(path).iter_batches(1024)
        done = 0
        for table in tables:
            names = table.schema.names
            columns = [_arrow_values(one, str(path), name) for name, one in zip(names, table.columns, strict=True)]
            for number, values in enumerate(zip(*columns, strict=True), start=done + 1):
                where = f"{path}, row {number}"
                yield RawRow(str(path), number, _mapping(dict(zip(names, values, strict=True)), where))
            done += len(columns[0]) if columns else 0
    except (pyarrow.ArrowException, OSError) as error:
        raise ReftuneError(f"{path} cannot be read as Parquet: {str(error).splitlines()[0]}") from error


def _arrow_values(column: Any, source: str, name: str) -> list[Any]:
    """A column's values; Arrow holds times that Python has no words for, and text that was never checked."""
    try:
        return column.to_pylist()
    except Exception:  # Arrow's, Python's and pandas' errors, which share no class
        for number, value in enumerate(column, start=1):
            try:
                value.as_py()
            except Exception as error:
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise ReftuneError(
                    f"{source}, row {number}: {name!r} ({column.type}) holds a value that Python cannot take: "
                    f"{reason}; correct it or leave the column out"
                ) from error
        raise


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
    return _read_memory(_load_hub(name), name, split)


def _load_hub(name: str, **options: Any) -> Any:
    import datasets

    dataset, _, config = name.partition(":")
    try:
        return datasets.load_dataset(dataset, config or None, **options)
    except Exception as error:  # hub, network and builder errors share no base class
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ReftuneError(
            f"{name} is neither a file here nor a dataset that could be fetched from the Hub ({reason}): "
            "check the spelling, the working folder or the connection"
        ) from error


def _read_memory(source: Any, name: str, split: str) -> list[RawRow]:
    import datasets

    if isinstance(source, Mapping) and isinstance(source, (datasets.DatasetDict, datasets.IterableDatasetDict)):
        if split not in source:
            raise ReftuneError(f"split={split!r}: {name} has the splits {', '.join(map(str, source))}")
        source = source[split]
    source = _table(source, name)
    if isinstance(source, Mapping) or not isinstance(source, Iterable) or isinstance(source, (str, bytes)):
        raise ReftuneError(
            f"cannot read rows from a {type(source).__name__}: give a path, a Dataset, a DataFrame, a list of dicts, "
            "or a dict with a list for each column"
        )
    numbered = enumerate(source, start=1)
    return [RawRow(name, number, _mapping(item, f"{name}, row {number}")) for number, item in numbered]


def _table(source: Any, name: str) -> Any:
    """The rows of a DataFrame (pandas, polars), an Arrow table or lists by column; anything else as it is."""
    if isinstance(source, Mapping):
        return _columns(source, name) or source
    if hasattr(source, "to_dicts"):
        return source.to_dicts()
    if hasattr(source, "to_pylist"):
        return source.to_pylist()
    if hasattr(source, "to_dict") and hasattr(source, "columns"):
        if not source.columns.is_unique:
            twice = source.columns[source.columns.duplicated()][0]
            raise ReftuneError(f"{name}: the DataFrame has the column {twice!r} twice: rename one of the two")
        return source.to_dict("records")
    return source


def _columns(values: Mapping[str, Any], name: str) -> list[dict[str, Any]] | None:
    """The rows of lists by column; None for a mapping that is something else, one row for instance.

    Raises:
        ReftuneError: the lists are of different lengths.
    """
    lists = [_as_list(value) for value in values.values()]
    if not lists or any(column is None or _is_conversation(column) for column in lists):
        return None
    lengths = {key: len(column) for key, column in zip(values, lists, strict=True) if column is not None}
    if len(set(lengths.values())) > 1:
        shown = ", ".join(f"{key!r} has {length}" for key, length in lengths.items())
        raise ReftuneError(f"{name}: the columns are of different lengths: {shown}")
    return [dict(zip(values, row, strict=True)) for row in zip(*lists, strict=True)]  # type: ignore[arg-type]


def _as_list(value: Any) -> list[Any] | None:
    if isinstance(value, (list, tuple)):
        return list(value)
    return value.tolist() if hasattr(value, "tolist") and getattr(value, "shape", ()) != () else None


def _is_conversation(column: list[Any]) -> bool:
    """Whether this is one row's list of turns and not a column of texts."""
    return any(isinstance(item, Mapping) for item in column)


def _mapping(item: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(item, Mapping):
        raise ReftuneError(f"{where} is a {type(item).__name__}; every row is an object with named fields")
    try:
        return {check_text(str(key), f"{where}: a name"): plain(item[key], f"{where}: {key!r}") for key in item}
    except RecursionError:
        raise ReftuneError(f"{where}: lists or objects are nested too deeply; flatten them") from None
