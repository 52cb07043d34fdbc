"""Rows read while they are trained on: every row once a pass, few held, the order a function of the seed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from reftune.data.formats import Example, Message
from reftune.data.reading import read_rows, stream_rows
from reftune.data.streaming import StreamedRows
from reftune.data.tokenising import Encoding
from reftune.errors import ReftuneError
from tests.cli.tiny_folder import tiny_tokenizer


def written(path: Path, count: int) -> Path:
    rows = [{"prompt": f"say {n}", "completion": str(n)} for n in range(count)]
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return path


def streamed(count: int, buffer: int, seed: int = 0, read: list[int] | None = None) -> StreamedRows:
    def examples() -> Iterator[list[Example]]:
        for number in range(count):
            if read is not None:
                read.append(number)
            yield [Example((Message("user", f"say {number}"),), str(number))]

    return StreamedRows("rows", examples, Encoding(tiny_tokenizer(), template="%s"), buffer, seed)


def order(rows: StreamedRows, count: int) -> list[str]:
    return [str(row["input_ids"]) for row in islice(iter(rows), count)]


def test_each_pass_has_every_row_once_in_an_order_of_its_own() -> None:
    found = order(streamed(20, buffer=6), 60)
    assert all(len({*found[start : start + 20]}) == 20 for start in (0, 20, 40))
    assert found[:20] != found[20:40] and found == order(streamed(20, buffer=6), 60)
    assert found != order(streamed(20, buffer=6, seed=1), 60)
    plain = order(streamed(20, buffer=1), 40)
    assert plain[:20] == plain[20:] and {*plain} == {*found}


def test_only_the_buffer_is_read_ahead() -> None:
    read: list[int] = []
    rows = iter(streamed(10_000, buffer=50, read=read))
    for drawn in range(1, 200):
        next(rows)
        assert len(read) <= drawn + 50


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_a_file_in_pieces_has_the_rows_of_the_whole_file(name: str, tmp_path: Path) -> None:
    path = written(tmp_path / name, 2500)
    assert list(stream_rows(str(path))) == read_rows(path)


def test_what_cannot_be_streamed_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("prompt,completion\na,b\n")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt"\n')
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "a"}\n{"prompt": "\xe9"}\n')
    for name, message in (
        ("rows.csv", r"streamed from \.jsonl or \.parquet"),
        ("none.jsonl", "there is no such file"),
        ("bad.jsonl", "not valid JSON at line 2"),
        ("latin.jsonl", "line 2: byte 0xe9 is not UTF-8"),
    ):
        with pytest.raises(ReftuneError, match=message):
            list(stream_rows(str(tmp_path / name)))
    with pytest.raises(ReftuneError, match="holds no rows"):
        next(iter(streamed(0, buffer=2)))
