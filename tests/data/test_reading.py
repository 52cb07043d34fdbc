import csv
from pathlib import Path

import datasets
import pytest

from reftune.data.reading import read_rows, stream_rows
from reftune.errors import ReftuneError


def _write(folder: Path, name: str, content: str | bytes) -> Path:
    file = folder / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


@pytest.mark.parametrize(
    ("name", "content", "numbers"),
    [
        ("a.csv", "prompt,completion\nhi,ho\n\nhey,hoy\n", [2, 4]),
        ("a.tsv", "prompt\tcompletion\nhi\tho\nhey\thoy\n", [2, 3]),
        ("a.jsonl", '{"prompt":"hi","completion":"ho"}\n\n{"prompt":"hey","completion":"hoy"}\n', [1, 3]),
        ("a.ndjson", '{"prompt":"hi","completion":"ho"}\n{"prompt":"hey","completion":"hoy"}', [1, 2]),
        ("a.json", '[{"prompt":"hi","completion":"ho"},{"prompt":"hey","completion":"hoy"}]', [1, 2]),
        ("a.json", '{"data":[{"prompt":"hi","completion":"ho"},{"prompt":"hey","completion":"hoy"}]}', [1, 2]),
        ("a.json", '{"prompt":"hi","completion":"ho"}\n{"prompt":"hey","completion":"hoy"}\n', [1, 2]),
    ],
)
def test_every_text_format_gives_the_same_rows_numbered_as_in_the_file(
    tmp_path: Path, name: str, content: str, numbers: list[int]
) -> None:
    rows = read_rows(_write(tmp_path, name, content))
    assert [dict(row.values) for row in rows] == [
        {"prompt": "hi", "completion": "ho"},
        {"prompt": "hey", "completion": "hoy"},
    ]
    assert [row.number for row in rows] == numbers
    assert rows[0].where == f"{tmp_path / name}, row {numbers[0]}"


def test_datasets_in_memory_on_disk_and_in_parquet_give_their_rows(tmp_path: Path) -> None:
    values = [{"prompt": "hi", "completion": "ho"}, {"prompt": "hey", "completion": "hoy"}]
    dataset = datasets.Dataset.from_list(values)
    dataset.save_to_disk(tmp_path / "saved")
    dataset.to_parquet(tmp_path / "rows.parquet")
    both = datasets.DatasetDict({"train": dataset, "test": dataset.select([1])})
    for source in (dataset, values, iter(values), both, str(tmp_path / "saved"), tmp_path / "rows.parquet"):
        rows = read_rows(source)
        assert [dict(row.values) for row in rows] == values
        assert [row.number for row in rows] == [1, 2]
    assert len(read_rows(both, split="test")) == 1
    with pytest.raises(ReftuneError, match=r"split='dev': rows in memory has the splits train, test"):
        read_rows(both, split="dev")


def test_csv_keeps_quoted_commas_newlines_byte_order_marks_and_very_long_fields(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    long = "x" * 200_000
    file = _write(tmp_path, "a.csv", f'\ufeffprompt,completion\n"one, two\nthree\u2028","say ""hi"""\nlast,{long}\n')
    rows = read_rows(file)
    assert rows[0].values == {"prompt": "one, two\nthree\u2028", "completion": 'say "hi"'}
    assert rows[1].values["completion"] == long and rows[1].number == 3
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "", "is empty (0 bytes)"),
        ("a.csv", "prompt,completion\n", "holds no rows"),
        ("a.csv", "\n\nprompt,completion\n", "row 1 is blank"),
        ("a.csv", "prompt,prompt\na,b\n", "row 1 names column 'prompt' twice"),
        ("a.csv", "prompt;completion\na;b\n", "fields seem to be separated by ';', not ','"),
        ("a.csv", "prompt,completion\na,b\nc,d,e\n", "row 3: 3 fields where the header has 2"),
        ("a.csv", "prompt,completion\na,b\nc\n", "row 3: 1 fields where the header has 2"),
        ("a.csv", 'prompt,completion\na,"b\n', "line 2: unexpected end of data; check the quotes"),
        ("a.csv", b"prompt,completion\nok,fine\nhi,caf\xe9\n", "line 3: byte 0xe9 is not UTF-8"),
        ("a.jsonl", '{"prompt":"a"}\n{"prompt":\n', "not valid JSON at line 2, column 11"),
        ("a.jsonl", '{"prompt":"a"}\n["b"]\n', "row 2 is a list; every row is an object"),
        ("a.jsonl", "\n\n", "holds no rows"),
        ("a.json", '[{"prompt":"a"},\n{"prompt" "b"}]', "not valid JSON at line 2, column 11"),
        ("a.json", '{"prompt":"a"}\n{"prompt":\n', "not valid JSON at line 2, column 11"),
        ("a.json", "3", "holds a JSON int; give a list of objects"),
        ("a.json", '[{"prompt":"a"}, 7]', "row 2 is a int; every row is an object"),
        ("a.json", "[]", "holds no rows"),
        ("a.parquet", "not parquet at all", "cannot be read as Parquet"),
        ("a.xlsx", "x", "extension '.xlsx' is not read; convert it to one of .csv, .tsv"),
        ("noextension", "x", "extension '' is not read"),
    ],
)
def test_a_broken_file_is_named_with_its_row_and_a_way_out(
    tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    file = _write(tmp_path, name, content)
    with pytest.raises(ReftuneError) as raised:
        read_rows(file)
    assert message in str(raised.value)
    assert str(file) in str(raised.value)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("bad", ['{"prompt":', '{"prompt":"a', '["b"]', "{'a': 1}"])
def test_a_broken_line_is_told_in_the_same_words_where_rows_are_streamed(tmp_path: Path, bad: str, end: str) -> None:
    file = _write(tmp_path, "a.jsonl", f'{{"prompt":"a"}}{end}{bad}{end}'.encode())
    told = []
    for read in (read_rows, lambda path: list(stream_rows(str(path)))):
        with pytest.raises(ReftuneError) as raised:
            read(file)
        told.append(str(raised.value))
    assert told[0] == told[1]


def test_a_missing_file_suggests_near_names(tmp_path: Path) -> None:
    _write(tmp_path, "training.csv", "x")
    with pytest.raises(ReftuneError, match=r"trainning\.csv: there is no such file; did you mean training\.csv\?"):
        read_rows(tmp_path / "trainning.csv")
    with pytest.raises(ReftuneError, match=r"zzzz\.jsonl: there is no such file; the folder .* was searched"):
        read_rows(tmp_path / "zzzz.jsonl")
    with pytest.raises(ReftuneError, match=r"the folder .*nowhere does not exist either"):
        read_rows(tmp_path / "nowhere" / "a.csv")


def test_a_folder_and_an_unreachable_hub_name_are_explained(tmp_path: Path) -> None:
    with pytest.raises(ReftuneError, match=r"is a folder, and not one written by Dataset\.save_to_disk"):
        read_rows(tmp_path)
    with pytest.raises(
        ReftuneError, match=r"nobody/nothing is neither a file here nor a dataset that could be fetched"
    ):
        read_rows("nobody/nothing")


def test_things_that_are_not_rows_are_refused() -> None:
    with pytest.raises(ReftuneError, match=r"cannot read rows from a int"):
        read_rows(3)
    with pytest.raises(ReftuneError, match=r"cannot read rows from a dict"):
        read_rows({"prompt": "a"})
    with pytest.raises(ReftuneError, match=r"rows in memory, row 2 is a str"):
        read_rows([{"prompt": "a"}, "b"])


def _tsv(folder: Path, content: str) -> list[list[str]]:
    return [list(row.values.values()) for row in read_rows(_write(folder, "a.tsv", content))]


def test_quotes_in_a_tsv_file_are_text_and_swallow_no_row(tmp_path: Path) -> None:
    said = 'text\ttext_pair\tlabel\n"Hello" she said\tb\t1\nplain\tc\t0\n'
    assert _tsv(tmp_path, said) == [['"Hello" she said', "b", "1"], ["plain", "c", "0"]]
    torn = 'text\ttext_pair\tlabel\n"Hello\tb\t1\nplain"\tc\t0\n'
    assert list(csv.reader(torn.split("\n")[:3], delimiter="\t"))[0] == ["text", "text_pair", "label"]
    assert len(list(csv.reader(torn.splitlines(True), delimiter="\t"))) == 2, (
        "the control: one of two rows is swallowed"
    )
    assert _tsv(tmp_path, torn) == [['"Hello', "b", "1"], ['plain"', "c", "0"]]
    assert _tsv(tmp_path, 'text\tlabel\n"all of it"\t1\nb\t0\n')[0] == ['"all of it"', "1"]
    with pytest.raises(ReftuneError, match="row 3: 2 fields where the header has 3"):
        _tsv(tmp_path, 'text\ttext_pair\tlabel\n"Hello" she said\tb\t1\nplain\tc\n')


def test_quotes_that_a_spreadsheet_put_around_fields_of_a_tsv_file_are_taken_off(tmp_path: Path) -> None:
    assert _tsv(tmp_path, 'text\tlabel\n"He said ""hi"""\t1\nb\t0\n')[0] == ['He said "hi"', "1"]
    assert _tsv(tmp_path, 'text\tlabel\n"two\nlines"\t1\nb\t0\n') == [["two\nlines", "1"], ["b", "0"]]
    assert _tsv(tmp_path, '"text"\t"label"\n"a"\t"1"\n') == [["a", "1"]]


@pytest.mark.parametrize("written", ["NaN", "nan", "<NA>", " NaT "])
@pytest.mark.parametrize("mark", [",", "\t"])
def test_what_pandas_writes_for_a_missing_value_is_missing(tmp_path: Path, written: str, mark: str) -> None:
    path = tmp_path / ("rows.csv" if mark == "," else "rows.tsv")
    path.write_text(f"text{mark}label\na{mark}1\nb{mark}{written}\nNancy{mark}2\n")
    assert [row.values for row in read_rows(path)] == [
        {"text": "a", "label": "1"}, {"text": "b", "label": None}, {"text": "Nancy", "label": "2"},
    ]  # fmt: skip
