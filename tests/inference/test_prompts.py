from __future__ import annotations

import json
from pathlib import Path

import pytest

from reftune.data.formats import Message
from reftune.errors import ReftuneError
from reftune.inference.prompts import read_prompts, to_jsonl


def test_a_text_file_has_a_prompt_a_line(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("one\n\n two \n")
    assert [row.shown for row in read_prompts(file)] == ["one", "two"]


def test_a_table_has_prompts_in_a_column_and_keeps_the_others(tmp_path: Path) -> None:
    file = tmp_path / "prompts.csv"
    file.write_text("id,question\n7,why?\n8,how?\n")
    rows = read_prompts(file, column="question", limit=1)
    assert rows[0].shown == "why?" and rows[0].row["id"] == "7" and len(rows) == 1


def test_alpaca_rows_and_conversations_are_prompts_too(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    file.write_text(to_jsonl([{"instruction": "add", "input": "1 2"}, {"messages": turns}]))
    first, second = read_prompts(file)
    assert first.messages == (Message("user", "add\n\n1 2"),)
    assert second.messages == (Message("user", "hi"),), "the answer is to be written, not read"


@pytest.mark.parametrize(
    ("row", "words"),
    [({"other": "hi"}, r"the columns \(other\) are none of: prompt; messages"), ({"prompt": " "}, "'prompt' is empty")],
)
def test_a_row_without_a_prompt_is_named(row: dict[str, str], words: str, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": "fine", "text": "fine"}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(ReftuneError, match=words) as caught:
        read_prompts(file)
    assert "row 2" in str(caught.value)


def test_an_empty_text_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("\n\n")
    with pytest.raises(ReftuneError, match="holds no prompts"):
        read_prompts(file)


def test_only_a_line_feed_ends_a_line_of_a_text_file(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    text = "first\u2028still first\x0band\x85so\r\nsecond\n"
    file.write_bytes(text.encode())
    assert len(text.splitlines()) == 5, "the control"
    assert [row.shown for row in read_prompts(file)] == ["first\u2028still first\x0band\x85so", "second"]
    file.write_bytes(b"fine\nno\xff\n")
    with pytest.raises(ReftuneError, match=r"prompts\.txt, line 2: byte 0xff is not UTF-8"):
        read_prompts(file)


def test_trainings_columns_are_used_where_the_file_has_them(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    usual = {"prompt": "question", "completion": "answer"}
    file.write_text(to_jsonl([{"question": "why?", "prompt": "not this"}]))
    assert read_prompts(file, usual=usual)[0].shown == "why?"
    assert read_prompts(file, column="prompt", usual=usual)[0].shown == "not this"
    file.write_text(to_jsonl([{"prompt": "this"}]))
    assert read_prompts(file, usual=usual)[0].shown == "this"
    with pytest.raises(ReftuneError, match=r"row 1: unknown column 'questoin' .* the columns are: prompt"):
        read_prompts(file, column="questoin")
