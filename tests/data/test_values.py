"""Missing values, other libraries' numbers and tables, and JSON and text that cannot be read."""

import datetime
import decimal
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch

from reftune.data.classification import read_texts
from reftune.data.formats import LabelledText, read_examples, read_labelled
from reftune.data.reading import read_rows
from reftune.data.values import json_text, plain
from reftune.errors import ReftuneError

MISSING = [None, float("nan"), np.nan, np.float32("nan"), pd.NA, pd.NaT, np.datetime64("NaT"), decimal.Decimal("NaN")]
"""The control: but for None, each of them is a text of its own, which was trained on."""


@pytest.mark.parametrize("value", MISSING, ids=repr)
def test_what_is_missing_is_missing_everywhere(value: Any) -> None:
    assert value is None or str(value).lower() in ("nan", "nat", "<na>")
    (example,) = read_examples([{"instruction": "Say hi", "input": value, "output": "hi", "system": value}])
    assert [message.content for message in example.messages] == ["Say hi"]
    with pytest.raises(ReftuneError, match="row 1: 'completion' is empty"):
        read_examples([{"prompt": "Hi", "completion": value}])
    with pytest.raises(ReftuneError, match="row 2: 'label' is empty"):
        read_texts([{"text": "a", "label": 1}, {"text": "b", "label": value}])
    with pytest.raises(ReftuneError, match="row 1: 'label' is null"):
        read_labelled([{"text": "a", "label": value}])
    with pytest.raises(ReftuneError, match="row 1: 'messages'.1.: the assistant's turn"):
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": value}]
        read_examples([{"messages": turns}])


def test_a_label_that_is_no_number_is_no_regression() -> None:
    with pytest.raises(ReftuneError, match="f.csv, row 2: the label is missing"):
        LabelledText("a", float("nan"), where="f.csv, row 2")


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (np.int64(3), 3), (np.float32(0.5), 0.5), (np.bool_(True), True), (np.str_("a"), "a"), (torch.tensor(3), 3),
        (np.array([["a", "b"]], dtype=object), [["a", "b"]]), (pd.Series([1, None]), [1.0, None]),
        ({"a": (np.int8(1), {"b": np.nan})}, {"a": [1, {"b": None}]}), (10**400, 10**400),
    ],
)  # fmt: skip
def test_other_libraries_values_are_what_they_are(value: Any, found: Any) -> None:
    assert plain(value, "row 1") == found
    assert type(plain(value, "row 1")) in (int, float, bool, str, np.str_, list, dict)


def test_tables_are_read_as_their_rows() -> None:
    columns: dict[str, Any] = {"prompt": ["a", "b"], "completion": ["c", None], "n": [1, 2]}
    frame = pd.DataFrame(columns)
    for source in (frame, columns, pa.table(columns), {key: np.array(value) for key, value in columns.items()}):
        rows = read_rows(source)
        assert [dict(row.values) for row in rows] == frame.astype(object).where(frame.notna(), None).to_dict("records")
        assert rows[1].where == "rows in memory, row 2"
    with pytest.raises(ReftuneError, match="different lengths: 'prompt' has 2, 'completion' has 1"):
        read_rows({"prompt": ["a", "b"], "completion": ["c"]})
    with pytest.raises(ReftuneError, match="the DataFrame has the column 'a' twice"):
        read_rows(pd.DataFrame([[1, 2]], columns=pd.Index(["a", "a"])))
    with pytest.raises(ReftuneError, match="'prompt' is a Timestamp; give text"):
        read_examples(pd.DataFrame({"prompt": [pd.Timestamp("2020-01-01")], "completion": ["a"]}))


def test_a_json_file_of_lists_by_column_is_a_table_and_of_one_conversation_a_row(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text(json.dumps({"prompt": ["a", "b"], "completion": ["c", "d"]}))
    assert [example.completion for example in read_examples(file)] == ["c", "d"]
    file.write_text(json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "bot", "content": "b"}]}))
    assert [example.completion for example in read_examples(file)] == ["b"]


DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize(
    ("value", "words"),
    [
        (DEEP, "nested too deeply"),
        ("[" * 950 + "]" * 950, "nested too deeply"),
        ("9" * 10_000, "a number has too many digits"),
        (r'"half \ud83d"', r"row 1: 'prompt' is no Unicode text: character 6 is the lone surrogate \\ud83d"),
        (r'[{"role": "user", "content": "\udc00"}]', r"row 1: 'prompt'\[0\]\.content is no Unicode text"),
    ],
    ids=["deep", "less deep", "digits", "surrogate", "surrogate inside"],
)
def test_json_that_nobody_can_use_is_one_message(name: str, value: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_text(f'{{"prompt": {value}, "completion": "a"}}')
    with pytest.raises(ReftuneError, match=words) as raised:
        read_examples(file)
    assert str(file) in str(raised.value)


def test_parquet_values_that_python_cannot_take_are_named(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    far = pa.array([0, 2**52], pa.timestamp("s"))
    pyarrow.parquet.write_table(pa.table({"prompt": ["a", "b"], "completion": ["c", "d"], "time": far}), file)
    with pytest.raises(ReftuneError, match=r"a\.parquet, row 2: 'time' \(timestamp\[m?s\]\) holds a value that Python"):
        read_examples(file)
    broken = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(np.array([0, 2], np.int32).tobytes()), pa.py_buffer(b"\xff\xfe")]
    )
    pyarrow.parquet.write_table(pa.table({"prompt": broken, "completion": ["c"]}), file)
    with pytest.raises(ReftuneError, match=r"a\.parquet, row 1: 'prompt' .* holds a value that Python cannot take"):
        read_examples(file)


def test_rows_are_written_with_times_decimals_and_bytes() -> None:
    row = {"t": datetime.datetime(2020, 1, 2, 3), "d": datetime.date(2020, 1, 2), "n": decimal.Decimal("1.10")}
    row |= {"b": b"\xff\x00", "s": "\u00e9", "delta": datetime.timedelta(seconds=1)}
    assert json.loads(json_text(row)) == {
        "t": "2020-01-02T03:00:00", "d": "2020-01-02", "n": "1.10", "b": "/wA=", "s": "\u00e9", "delta": "0:00:01",
    }  # fmt: skip
    assert "\u00e9" in json_text(row)
