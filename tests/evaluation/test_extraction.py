"""What an answer says is read as the paper's evaluation reads it."""

from __future__ import annotations

import pytest

from reftune.evaluation.extraction import last_number, letter, option_word, same

ANSWERS = ("answer1", "answer2", "answer3", "answer4")


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("the correct answer is answer2", "answer2"),
        ("answer1 is wrong; the correct answer is Answer3, not answer4", "answer3"),
        ("I take answer4 over answer1", "answer4"),
        ("the correct answer is none. But answer1", "answer1"),
        ("answer1 seems right; the correct answer is unknown", None),
        ("answer12 or myanswer1", None),
        ("", None),
    ],
)
def test_the_first_option_word_after_the_stated_answer_counts(text: str, word: str | None) -> None:
    assert option_word(text, ANSWERS) == word


def test_truth_words_are_words_of_their_own() -> None:
    assert option_word("It is untrue, so False.", ("true", "false")) == "false"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("First 3, then 4. The answer is 1,250.50.", 1250.5),
        ("it fell by -7 degrees", -7.0),
        ("20 - 15 = 5.", 5.0),
        ("none at all", None),
        ("9" * 400, None),
    ],
)
def test_the_last_number_counts_commas_removed(text: str, number: float | None) -> None:
    assert last_number(text) == number


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("A boat. The answer is (C).", "C"),
        ("the answer is: b", "B"),
        ("So (A) is too small, (D) fits", "D"),
        ("A", "A"),
        ("Because Ellen Ate", None),
    ],
)
def test_a_letter_stands_alone_and_the_stated_one_comes_first(text: str, found: str | None) -> None:
    assert letter(text) == found


def test_numbers_are_the_same_within_a_thousandth() -> None:
    assert same(0.6667, 0.6666666666666666)
    assert not same(0.67, 0.6666666666666666)
    assert not same(None, 0.0)
    assert same("answer1", "answer1") and not same(None, "answer1")
