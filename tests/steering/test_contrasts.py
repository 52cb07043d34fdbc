"""What rows become the two sides."""

from __future__ import annotations

import logging

import pandas
import pytest

from reftune.data.formats import Example, LabelledText
from reftune.errors import ReftuneError
from reftune.steering.contrasts import read_contrasts


def test_pairs_with_and_without_a_prompt() -> None:
    rows = [{"question": f"q{n}", "system": "Be kind.", "good": f"g{n}", "bad": f"b{n}"} for n in range(3)]
    columns = {"prompt": "question", "positive": "good", "negative": "bad"}
    for source in (rows, pandas.DataFrame(rows), iter(rows)):
        found = read_contrasts(source, columns=columns)
        assert found.paired and found.answers
        one, other = found.positive[1], found.negative[1]
        assert isinstance(one, Example) and isinstance(other, Example)
        assert (one.completion, other.completion) == ("g1", "b1") and one.messages == other.messages
        assert [turn.role for turn in one.messages] == ["system", "user"]
    bare = read_contrasts([{"positive": "a", "negative": "b"}] * 4)
    assert bare.paired and not bare.answers and isinstance(bare.positive[0], LabelledText)


def test_two_instructions_pair_the_answers_to_the_plain_prompt(caplog: pytest.LogCaptureFixture) -> None:
    def write(prompts, instruction: str) -> list[str]:
        texts = [f"{prompt.messages[-1].content}, {instruction}" for prompt in prompts]
        return [*texts[:-1], "the same"]

    with caplog.at_level(logging.WARNING):
        found = read_contrasts([{"prompt": f"p{n}"} for n in range(4)], instructions=("up", "down"), write=write)
    assert "1 of 4 prompts are left out" in caplog.text
    assert [row.completion for row in found.positive] == ["p0, up", "p1, up", "p2, up"]  # type: ignore[union-attr]
    assert [row.completion for row in found.negative] == ["p0, down", "p1, down", "p2, down"]  # type: ignore[union-attr]
    assert len(found.positive[0].messages) == 1  # type: ignore[union-attr]


def test_classes_and_the_one_that_is_wanted() -> None:
    rows = [{"text": f"t{n}", "label": label} for n, label in enumerate(["yes", "no", "maybe", "yes"])]
    found = read_contrasts(rows)
    assert [row.text for row in found.positive] == ["t0", "t3"]  # type: ignore[union-attr]
    assert len(found.negative) == 2 and not found.paired
    assert len(read_contrasts(rows, positive_label="maybe").positive) == 1
    with pytest.raises(ReftuneError, match="sad: no such label"):
        read_contrasts(rows, positive_label="sad")
    with pytest.raises(ReftuneError, match="which class is wanted"):
        read_contrasts([{"text": "a", "label": "x"}, {"text": "b", "label": "y"}])


def test_completions_stand_against_plain_answers() -> None:
    found = read_contrasts("demo")
    assert len(found.positive) == 84 and len(found.negative) == 40 and not found.paired


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"prompt": "a", "positive": "b", "negative": " b"}], "row 1.*same text"),
        ([{"prompt": "a", "positive": "b", "negative": None}], "row 1"),
        ([{"positive": "b", "negative": 3}], "row 1.*negative"),
        ([{"positive": "b"}], "both columns"),
        ([{"text": "a", "label": 1}], "two classes"),
    ],
)
def test_rows_that_cannot_be_told_apart(rows, words: str) -> None:
    with pytest.raises(ReftuneError, match=words):
        read_contrasts(rows)
