"""Rows with options become scores, and what is wrong with a row is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from reftune.data.formats import Message
from reftune.data.tokenising import Encoding
from reftune.errors import ReftuneError
from reftune.evaluation.options import OptionRow, OptionScores, evaluate_options, option_row, read_option_rows
from reftune.inference.loading import EditedModel
from tests.inference.edited import tiny_edited

ROWS = [
    {"prompt": "is it?", "options": ["yes", "no"], "answer": "no"},
    {"prompt": "a longer question", "options": ["one", "two", "three hundred"], "answer": 2},
]


@pytest.fixture(scope="module")
def edited(tmp_path_factory: pytest.TempPathFactory) -> EditedModel:
    return tiny_edited(tmp_path_factory.mktemp("model"), positions="f1+l2")


def test_options_are_continuations_of_the_prompt_as_in_training(edited: EditedModel) -> None:
    scores = evaluate_options(edited.model, edited.tokenizer, ROWS)
    prompt = edited.encoding.prompt_ids(["a longer question"])[0]
    option: Any = edited.tokenizer("three hundred", add_special_tokens=False).input_ids
    with torch.no_grad():
        logits = edited.model(
            input_ids=torch.tensor([prompt + option]), prompt_lengths=torch.tensor([len(prompt)])
        ).logits[0].log_softmax(-1)  # fmt: skip
    truth = sum(float(logits[len(prompt) - 1 + step, token]) for step, token in enumerate(option))
    assert scores[1].log_likelihoods[2] == pytest.approx(truth, abs=1e-4)
    assert (scores[1].tokens[2], scores[1].bytes[2], scores[1].answer) == (len(option), 13, 2)
    assert scores[0].answer == 1


def test_a_raw_template_and_messages_are_taken_as_prompts(edited: EditedModel) -> None:
    raw = Encoding(edited.tokenizer, "%s")
    chat = evaluate_options(edited.model, edited.tokenizer, [OptionRow([Message("user", "is it?")], ("yes", "no"))])
    text = evaluate_options(edited.model, edited.tokenizer, ROWS[:1])
    plain = evaluate_options(edited.model, edited.tokenizer, ROWS[:1], encoding=raw)
    assert chat[0].log_likelihoods == text[0].log_likelihoods
    assert plain[0].log_likelihoods != text[0].log_likelihoods


def test_norms_choose_by_sum_by_byte_and_by_token() -> None:
    scores = OptionScores((-4.0, -5.0, -6.0), (1, 1, 2), (1, 10, 11), answer=2)
    assert [scores.chosen(norm) for norm in ("acc", "acc_norm", "acc_token")] == [0, 1, 2]
    assert [scores.right(norm) for norm in ("acc", "acc_norm", "acc_token")] == [False, False, True]
    with pytest.raises(ReftuneError, match="no answer"):
        OptionScores((-1.0,), (1,), (1,)).right()


def test_finished_rows_are_told(edited: EditedModel) -> None:
    told: list[int] = []
    evaluate_options(edited.model, edited.tokenizer, ROWS * 3, batch_size=4, advance=told.append)
    assert told == [4, 2]


def test_rows_come_from_json_lines_and_csv(tmp_path: Path) -> None:
    lines = tmp_path / "rows.jsonl"
    lines.write_text("\n".join(map(json.dumps, ROWS)))
    table = tmp_path / "rows.csv"
    table.write_text('prompt,options,answer\nis it?,yes|no,no\na longer question,"[""one"", ""two|2""]",0\n')
    assert [row.answer for row in read_option_rows(lines)] == [1, 2]
    found = read_option_rows(table)
    assert found[0] == OptionRow("is it?", ("yes", "no"), 1, f"{table}, row 2")
    assert found[1].options == ("one", "two|2")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"options": ["a"]}, "field 'prompt' is missing; this row has: options"),
        ({"prompt": "p", "options": []}, "field 'options' is empty"),
        ({"prompt": "p", "options": ["a", ""]}, "none of them empty"),
        ({"prompt": "p", "options": "[1"}, "begins like a JSON list"),
        ({"prompt": "p", "options": ["a", "b"], "answer": "c"}, "'answer' is 'c'"),
        ({"prompt": "p", "options": ["a", "b"], "answer": 2}, "index from 0 to 1"),
        ({"prompt": "p", "options": ["a", "b"], "answer": True}, "'answer' is True"),
        ({"prompt": 3, "options": ["a", "b"]}, "'prompt' is a int"),
    ],
)
def test_what_is_wrong_with_a_row_is_named(row: dict[str, Any], words: str) -> None:
    with pytest.raises(ReftuneError, match="^f.json, row 7: ") as caught:
        option_row(row, "f.json, row 7")
    assert words in str(caught.value)


def test_a_row_longer_than_the_context_is_named(edited: EditedModel) -> None:
    with pytest.raises(ReftuneError, match="row 1: prompt and longest option have .* limit of 256"):
        evaluate_options(edited.model, edited.tokenizer, [{"prompt": "x" * 300, "options": ["a", "b"]}])
