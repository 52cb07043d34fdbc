"""Rows for classification: a text or a pair of texts, and a label given by name or number (or a score to predict).

| columns | where it comes from |
|---|---|
| `text`, optional `text_pair` | our own form |
| `sentence` | GLUE's CoLA and SST-2 |
| `sentence1`, `sentence2` | MRPC, RTE, STS-B |
| `question1`, `question2` | QQP |
| `premise`, `hypothesis` | MNLI |
| `question`, `sentence` | QNLI |
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from reftune.data.formats import LabelledText
from reftune.data.reading import RawRow, Source, read_rows
from reftune.errors import ReftuneError

NUMBER = "number"
"""In place of class names: the label is a number to predict (regression)."""

_SHAPES = (
    ("text", "text_pair"), ("text",), ("premise", "hypothesis"), ("sentence1", "sentence2"),
    ("question1", "question2"), ("question", "sentence"), ("sentence",),
)  # fmt: skip
_FIELDS = ("text", "text_pair", "label")
_MOST_CLASSES = 1000


@dataclass(frozen=True)
class LabelScheme:
    """What the labels mean: class names in the order of their ids, or none where the label is a number to predict."""

    names: tuple[str, ...]

    @property
    def regression(self) -> bool:
        """Whether a number is predicted."""
        return not self.names

    @property
    def numbered(self) -> bool:
        """Whether the names are the ids themselves."""
        return self.names == tuple(map(str, range(len(self.names))))

    @property
    def outputs(self) -> int:
        """Outputs of the head."""
        return len(self.names) or 1

    def read(self, row: LabelledText) -> LabelledText:
        """The row with its label as a class name, or as a float.

        Raises:
            ReftuneError: naming the row and its label.
        """
        label = row.label
        if self.regression:
            number = _as_number(label)
            if number is None:
                raise ReftuneError(f"{row.where}: label {label!r} is not a number, and a number is to be predicted")
            return replace(row, label=number)
        if str(label) in self.names and not self.numbered:
            return replace(row, label=str(label))
        number = _as_number(label)
        if number is not None and number.is_integer() and 0 <= number < len(self.names):
            return replace(row, label=self.names[int(number)])
        if number == -1:
            raise ReftuneError(
                f"{row.where}: label -1 marks a row without a label (GLUE's test splits); use another file"
            )
        close = difflib.get_close_matches(str(label), self.names, n=1)
        meant = f"; did you mean {close[0]!r}?" if close else ""
        raise ReftuneError(
            f"{row.where}: label {label!r} is not among the classes {', '.join(self.names)} "
            f"(or their numbers, 0 to {len(self.names) - 1}){meant}"
        )


def read_texts(
    source: Source,
    *,
    columns: Mapping[str, str] | None = None,
    names: Sequence[str] = (),
    split: str = "train",
    limit: int | None = None,
    labelled: bool = True,
) -> list[LabelledText]:
    """Read rows with their labels as they stand in the file (see `label_scheme`).

    One text of a pair may be empty, as in a few rows of QQP; a row without any text is an error.

    Args:
        source: as for `reading.read_rows`.
        columns: from `text`, `text_pair` and `label` to the column that holds it.
        names: columns of the text and of the second one, for fields that `columns` does not name; by default the first
            set of the table above that the file has.
        split: split of a Hub dataset.
        limit: read only the first rows.
        labelled: whether rows must have a label; without, every label is "".

    Raises:
        ReftuneError: naming file, row and column.
    """
    rows = read_rows(source, split=split)[:limit]
    found = _find_columns(rows[0], columns or {}, names, labelled)
    texts = []
    for row in rows:
        text, pair = (_text(row, found[name]) if name in found else None for name in ("text", "text_pair"))
        if not (text or "").strip() and not (pair or "").strip():
            raise ReftuneError(f"{row.where}: {found['text']!r} is empty; write a text or delete the row")
        texts.append(LabelledText(text or "", _label(row, found["label"]) if labelled else "", pair, row.where))
    return texts


def label_scheme(rows: Sequence[LabelledText], labels: Sequence[str] | str | None = None) -> LabelScheme:
    """What the labels of training rows mean.

    Args:
        rows: as `read_texts` returns them.
        labels: class names in the order of their ids, or "number" for a regression; None finds out: whole numbers are
            ids, other numbers are a regression, anything else is a class name (sorted).

    Raises:
        ReftuneError: fewer than two classes, or numbers that cannot be ids.
    """
    source = rows[0].where.rpartition(", row ")[0]
    if labels == NUMBER:
        return LabelScheme(())
    if labels is not None:
        scheme = LabelScheme(tuple(labels))
    else:
        found = {row.label for row in rows}
        numbers = [_as_number(label) for label in found]
        if any(number is None for number in numbers):
            scheme = LabelScheme(tuple(sorted({str(label) for label in found})))
        elif not all(number is not None and number.is_integer() for number in numbers):
            return LabelScheme(())
        else:
            scheme = _numbered(rows, [int(number) for number in numbers if number is not None])
    used = {scheme.read(row).label for row in rows}
    if len(used) < 2:
        raise ReftuneError(
            f"{source}: all {len(rows)} rows have the label {next(iter(used))!r}, so there is nothing to tell apart; "
            "add rows of another class"
        )
    return scheme


def _numbered(rows: Sequence[LabelledText], ids: list[int]) -> LabelScheme:
    for limit, which in ((min(ids), min), (max(ids), max)):
        if 0 <= limit < _MOST_CLASSES:
            continue
        row = which(rows, key=lambda row: _as_number(row.label) or 0.0)
        raise ReftuneError(
            f"{row.where}: label {row.label} is no class number (0 to {_MOST_CLASSES - 1}); where a number is to be "
            f"predicted set labels: {NUMBER}, else name the classes with labels"
        )
    return LabelScheme(tuple(str(number) for number in range(max(ids) + 1)))


def _find_columns(row: RawRow, columns: Mapping[str, str], names: Sequence[str], labelled: bool) -> dict[str, str]:
    """From `text`, `text_pair` and `label` to columns that the first row has."""
    for field in columns:
        if field not in _FIELDS:
            raise ReftuneError(f"columns: {field!r} is not a field; map one of {', '.join(_FIELDS)}")
    if "text" in columns:
        names = ()
        found = dict(columns)
    else:
        names = names or next((shape for shape in _SHAPES if set(shape) <= set(row.values)), ())
        if not names:
            shapes = "; ".join(" + ".join(shape) for shape in _SHAPES)
            raise ReftuneError(
                f"{row.source}: the columns ({', '.join(map(str, row.values))}) hold none of: {shapes}. Rename them, "
                "or map them: columns: text=review,label=stars"
            )
        found = dict(zip(_FIELDS, names, strict=False)) | dict(columns)
    if labelled:
        found.setdefault("label", "label")
    else:
        found.pop("label", None)
    for column in found.values():
        _value(row, column)
    return found


def _value(row: RawRow, column: str) -> Any:
    if column not in row.values:
        present = [str(name) for name in row.values]
        close = difflib.get_close_matches(column, present, n=1)
        meant = f"; did you mean {close[0]!r}?" if close else ""
        raise ReftuneError(f"{row.where}: column {column!r} is missing; this row has: {', '.join(present)}{meant}")
    return row.values[column]


def _text(row: RawRow, column: str) -> str:
    value = _value(row, column)
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ReftuneError(f"{row.where}: {column!r} is a {type(value).__name__}; give text")
    return str(value)


def _label(row: RawRow, column: str) -> int | float | str:
    value = _value(row, column)
    if isinstance(value, str):
        value = value.strip()
    if value is None or value == "":
        raise ReftuneError(f"{row.where}: {column!r} is empty; give a class name or a number, or delete the row")
    if not isinstance(value, (str, int, float)) or (isinstance(value, float) and not math.isfinite(value)):
        shown = value if isinstance(value, float) else f"a {type(value).__name__}"
        raise ReftuneError(f"{row.where}: {column!r} is {shown}; give a class name or a number")
    return int(value) if isinstance(value, bool) else value


def _as_number(label: int | float | str) -> float | None:
    try:
        number = float(label)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
