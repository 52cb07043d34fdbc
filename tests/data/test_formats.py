from pathlib import Path
from typing import Any

import pytest

from reftune.data.formats import Example, LabelledText, Message, read_examples, read_labelled, read_prompts
from reftune.data.reading import read_rows
from reftune.errors import ReftuneError

WHERE = "rows in memory, row 1"
USER, BOT, SYSTEM = "user", "assistant", "system"


def _only(row: dict[str, Any], columns: dict[str, str] | None = None) -> Example:
    (example,) = read_examples([row], columns=columns)
    return example


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"prompt": "Hi", "completion": "Yo"}, [(USER, "Hi")]),
        ({"prompt": "Hi", "completion": "Yo", "system": "Be kind"}, [(SYSTEM, "Be kind"), (USER, "Hi")]),
        ({"prompt": [{"role": USER, "content": "Hi"}], "completion": [{"role": BOT, "content": "Yo"}]}, [(USER, "Hi")]),
        ({"instruction": "Add", "input": "1 2", "output": "Yo"}, [(USER, "Add\n\n1 2")]),
        ({"instruction": "Add", "input": "", "output": "Yo", "answer": "x"}, [(USER, "Add")]),
        ({"instruction": "Add", "output": "Yo"}, [(USER, "Add")]),
        ({"instruction": "Add", "input": None, "output": "Yo"}, [(USER, "Add")]),
        ({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}, [(USER, "Hi")]),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]}, [(USER, "Hi")]),
        ({"text": "Hi", "label": "Yo"}, [(USER, "Hi")]),
        ({"messages": [{"role": USER, "content": [{"text": "Hi"}]}, {"role": BOT, "content": "Yo"}]}, [(USER, "Hi")]),
    ],
)  # fmt: skip
def test_each_shape_becomes_the_same_example(row: dict[str, Any], messages: list[tuple[str, str]]) -> None:
    assert _only(row) == Example(tuple(Message(*message) for message in messages), "Yo", WHERE)


def test_a_conversation_gives_one_example_for_every_assistant_turn() -> None:
    turns = [(SYSTEM, "S"), (USER, "a"), (BOT, "b"), (USER, "c"), (BOT, "d")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    first, second = read_examples([row])
    assert [message.content for message in first.messages] == ["S", "a"] and first.completion == "b"
    assert [message.content for message in second.messages] == ["S", "a", "b", "c"] and second.completion == "d"
    assert first.where == second.where == WHERE


def test_an_assistant_turn_before_any_user_turn_is_history_only() -> None:
    turns = [("gpt", "welcome"), ("human", "a"), ("gpt", "b")]
    (example,) = read_examples([{"conversations": [{"from": who, "value": text} for who, text in turns]}])
    assert [message.content for message in example.messages] == ["welcome", "a"] and example.completion == "b"


def test_columns_are_mapped_and_win_over_fields_that_are_also_there() -> None:
    assert _only({"question": "Hi", "answer": "Yo"}, {"prompt": "question", "completion": "answer"}).completion == "Yo"
    row = {"instruction": "Hi", "output": "long", "answer": "short"}
    assert _only(row, {"output": "answer"}).completion == "short"
    both = {"prompt": "p", "completion": "c", "text": "t", "category": "x"}
    assert _only(both, {"label": "category"}).completion == "x"


def test_numbers_are_kept_as_text(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text("prompt,completion\n1+1,02\n")
    assert read_examples(file)[0].completion == "02"
    assert _only({"prompt": "1+1", "completion": 2}).completion == "2"


def test_limit_reads_the_first_rows_only() -> None:
    assert len(read_examples([{"prompt": "a", "completion": "b"}] * 3, limit=2)) == 2


def _chat(*turns: dict[str, Any]) -> dict[str, Any]:
    return {"messages": list(turns)}


_ASK = {"role": "user", "content": "a"}
UNKNOWN_COLUMN = (
    "unknown column 'anser' for the field 'completion'; the columns are: prompt, answer; did you mean 'answer'?"
)


@pytest.mark.parametrize(
    ("row", "columns", "message"),
    [
        ({"prompt": "a", "completion": " "}, None, f"{WHERE}: 'completion' is empty"),
        ({"prompt": "a", "completion": None}, None, f"{WHERE}: 'completion' is empty"),
        ({"prompt": "", "completion": "b"}, None, f"{WHERE}: 'prompt' is empty"),
        ({"prompt": {"x": 1}, "completion": "b"}, None, f"{WHERE}: 'prompt' is a dict; give text"),
        ({"prompt": True, "completion": "b"}, None, f"{WHERE}: 'prompt' is a bool; give text"),
        ({"q": "a", "completion": ""}, {"prompt": "q"}, f"{WHERE}: 'completion' is empty"),
        ({"q": " ", "completion": "b"}, {"prompt": "q"}, f"{WHERE}: 'prompt' (column 'q') is empty"),
        ({"a": "b"}, None, "the columns (a) are none of: prompt + completion; messages"),
        ({"prompt": "b"}, None, "map them, e.g. columns={'prompt': 'question'"),
        ({"prompt": "b", "answer": "c"}, {"completion": "anser"}, UNKNOWN_COLUMN),
        ({"prompt": "b", "completion": "c"}, {"prompts": "prompt"}, "columns: 'prompts' is not a field; map one of"),
        ({"prompt": "b", "completion": [_ASK]}, None, f"{WHERE}: 'completion': give one assistant message"),
        ({"messages": []}, None, f"{WHERE}: 'messages' is an empty list; give a list of messages"),
        ({"messages": "hello"}, None, f"{WHERE}: 'messages' is a str; give a list of messages"),
        (_chat({"role": "user"}), None, f"{WHERE}: 'messages'[0] has no 'content'; it has: role"),
        (_chat({"role": "pilot", "content": "a"}), None, f"{WHERE}: 'messages'[0]: role='pilot' is not a role"),
        ({"messages": ["hello"]}, None, f"{WHERE}: 'messages'[0] is a str; give an object"),
        (_chat(_ASK), None, "has no assistant turn after a user turn"),
        (_chat({"role": "assistant", "content": "hi"}), None, "has no assistant turn after a user turn"),
        (_chat(_ASK, {"role": BOT, "content": ""}), None, "[1]: the assistant's turn (the completion) is empty"),
        (_chat({"role": USER, "content": [{"type": "image"}]}), None, "'messages'[0].content has a part that is not"),
        ({"text": "a", "label": None}, None, f"{WHERE}: 'label' is null; give a class name or a number"),
    ],
)  # fmt: skip
def test_a_bad_row_is_named_with_its_field(row: dict[str, Any], columns: dict[str, str] | None, message: str) -> None:
    with pytest.raises(ReftuneError) as raised:
        read_examples([row], columns=columns)
    assert message in str(raised.value)


def test_the_row_of_a_file_is_named_as_an_editor_numbers_it(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"prompt":"a","completion":"b"}\n{"prompt":"a","completion":""}\n{"prompt":"a"}\n')
    with pytest.raises(ReftuneError, match=r"a\.jsonl, row 2: 'completion' is empty"):
        read_examples(file)
    file.write_text('{"prompt":"a","completion":"b"}\n\n{"prompt":"a"}\n')
    with pytest.raises(ReftuneError, match=r"a\.jsonl, row 3: field 'completion' is missing; this row has: prompt"):
        read_examples(file)


def test_labelled_text_keeps_its_label_type_and_pair() -> None:
    rows = [{"text": "a", "label": 1}, {"text": "b", "label": "yes", "text_pair": "c"}, {"text": "d", "label": 0.5}]
    first, second, third = read_labelled(rows)
    assert first == LabelledText("a", 1, None, WHERE)
    assert (second.label, second.text_pair) == ("yes", "c")
    assert third.label == 0.5
    with pytest.raises(ReftuneError, match=r"are none of: text \+ label"):
        read_labelled([{"prompt": "a", "completion": "b"}])


@pytest.mark.parametrize("key", ["weight", "loss", "train"])
@pytest.mark.parametrize("no", [0, False, 0.0])
def test_a_turn_that_is_not_to_be_learnt_is_context(key: str, no: Any) -> None:
    turns = [(USER, "a", None), (BOT, "wrong", no), (USER, "b", None), (BOT, "right", 1)]
    row = {"messages": [{"role": role, "content": text, key: value} for role, text, value in turns]}
    (example,) = read_examples([row])
    assert example.completion == "right"
    assert [message.content for message in example.messages] == ["a", "wrong", "b"]
    del row["messages"][1][key]
    assert [example.completion for example in read_examples([row])] == ["wrong", "right"], "the control"
    row["messages"][1][key] = 0.5
    with pytest.raises(ReftuneError, match=rf"row 1: 'messages'\[1\]: {key}=0\.5: 1 .* learns a turn and 0"):
        read_examples([row])
    row["messages"][1][key] = row["messages"][3][key] = no
    with pytest.raises(ReftuneError, match="every assistant's turn is left out"):
        read_examples([row])


def test_the_history_of_an_alpaca_row_is_context() -> None:
    example = _only({"instruction": "c", "output": "d", "history": [["a", "b"]], "system": "S"})
    assert [(m.role, m.content) for m in example.messages] == [(SYSTEM, "S"), (USER, "a"), (BOT, "b"), (USER, "c")]
    with pytest.raises(ReftuneError, match=r"row 1: 'history'\[0\] is 'a'; give \[question, answer\]"):
        read_examples([{"instruction": "c", "output": "d", "history": ["a"]}])


def test_a_prompt_beside_messages_counts_where_it_is_filled(caplog: pytest.LogCaptureFixture) -> None:
    turns = [{"role": USER, "content": "a"}, {"role": BOT, "content": "b"}]
    assert _only({"prompt": None, "completion": None, "messages": turns}).completion == "b"
    assert not caplog.records
    assert _only({"prompt": "p", "completion": "c", "messages": turns, "context": "told"}).completion == "c"
    assert "so context, messages are not used" in caplog.text


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi", "completion": "x", "system": "Speak Latin."}, {"prompt": 5, "completion": "x"},
        {"messages": [{"role": USER, "content": [{"type": "text", "text": "Hi"}]}, {"role": BOT, "content": "x"}]},
        {"messages": [{"role": "human", "content": "Hi"}, {"role": "gpt", "content": "x"}], "system": "S"},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "x"}]},
        {"instruction": "a", "input": float("nan"), "output": "x", "history": [["q", "a"]]},
        {"text": "a", "text_pair": "b", "label": 1},
    ],
)  # fmt: skip
def test_a_row_is_the_same_prompt_to_answer_as_to_learn_from(row: dict[str, Any]) -> None:
    (example,) = read_examples([row])
    assert read_prompts(read_rows([row]))[0].messages == example.messages
    answers = ("completion", "output", "label")
    unanswered = {key: value for key, value in row.items() if key not in answers}
    assert read_prompts(read_rows([unanswered]))[0].messages == example.messages


@pytest.mark.parametrize("left_out", [{"weight": 0}, {"loss": False}, {"train": "false"}, {"weight": "0"}])
def test_a_row_that_says_so_is_left_out_of_what_is_learnt(left_out: dict[str, Any]) -> None:
    rows = [{"prompt": "q", "completion": "a", **left_out}, {"prompt": "r", "completion": "b"}]
    assert [example.completion for example in read_examples(rows)] == ["b"]
    conversation = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    learnt = {"messages": [conversation[0], {"role": "assistant", "content": "b"}]}
    assert [e.completion for e in read_examples([{"messages": conversation, **left_out}, learnt])] == ["b"]
    assert [e.completion for e in read_examples([{"prompt": "q", "completion": "a", "weight": 0.5}])] == ["a"]
    mapped = [{"prompt": "q", "train": "false"}]  # a text of the row, not a mark
    assert [e.completion for e in read_examples(mapped, columns={"completion": "train"})] == ["false"]


def test_a_system_column_beside_a_system_message_is_told(caplog: pytest.LogCaptureFixture) -> None:
    turns = [{"role": role, "content": text} for role, text in (("system", "S2"), ("user", "q"), ("assistant", "a"))]
    (example,) = read_examples([{"system": "S1 of this test", "messages": turns}])
    assert [turn.content for turn in example.messages] == ["S2", "q"]
    assert "'system' is not used" in caplog.text


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (
            {"messages": [{"role": "user", "content": None}, {"role": "assistant", "content": "a"}]},
            r"row 1.*\[0\].*missing",
        ),
        ({"conversations": [{"from": "human", "value": float("nan")}, {"from": "gpt", "value": "a"}]}, r"row 1.*\[0\]"),
        ({"instruction": "q", "output": "a", "history": [["x", None]]}, r"row 1.*history.*\[0\] lacks"),
    ],
)
def test_a_turn_whose_text_is_missing_is_no_empty_turn(row: dict[str, Any], words: str) -> None:
    with pytest.raises(ReftuneError, match=words):
        read_examples([row])


def test_tools_that_are_none_written_as_text_are_none() -> None:
    (example,) = read_examples([{"prompt": "q", "completion": "a", "tools": " [] "}])
    assert example.tools == ()
