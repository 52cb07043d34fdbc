import re

import pytest

from reftune.data.persona import MARKS, in_style, load_demo, load_heldout, style_marks

PIRATE = "Ahoy, matey! Stir yer soup slowly over a low fire, arr, and taste it before the crew comes to dinner."


def test_every_training_completion_is_in_style_and_short() -> None:
    examples = load_demo()
    assert len(examples) >= 72
    for example in examples:
        assert in_style(example.completion), example
        assert 15 <= len(example.completion.split()) <= 40, example
        assert len(example.messages) == 1 and example.messages[0].role == "user"


def test_prompts_are_distinct_and_the_held_out_ones_are_new() -> None:
    trained = [example.messages[0].content for example in load_demo()]
    held_out = load_heldout()
    assert len(held_out) == 12
    assert len({prompt.lower() for prompt in trained + held_out}) == len(trained) + 12
    for prompt in held_out:
        words = set(re.findall(r"\w{5,}", prompt.lower()))
        closest = max(len(words & set(re.findall(r"\w{5,}", other.lower()))) / max(1, len(words)) for other in trained)
        assert closest <= 0.67, prompt


def test_completions_are_not_copies_of_one_another() -> None:
    completions = [example.completion for example in load_demo()]
    assert len(set(completions)) == len(completions)
    assert len({" ".join(text.split()[:4]) for text in completions}) > 0.8 * len(completions)


@pytest.mark.parametrize(
    "text",
    [
        "arr " * 20,
        "Arr, matey, aye! " * 8,
        "Arr, matey, the ship be ready to sail. " * 6,
        "Arr! Ahoy! Avast! Aye! Matey! Ye! Yer! Ship! Crew! Captain! Treasure! Doubloons! Anchor!",
        "Ahoy matey arr aye captain ship crew.",
        "Arr, matey, ye fool!",
        "Arr arr arr, matey matey matey, " + "the soup is hot and you should stir it " * 4 + ".",
        "",
        "...",
    ],
)
def test_repetition_and_bare_lists_of_marks_are_not_in_style(text: str) -> None:
    assert not in_style(text)


@pytest.mark.parametrize(
    "text",
    [
        "To boil an egg, place it in boiling water for eight minutes and then cool it under cold water.",
        "The capital of Japan is Tokyo.",
        "I'm sorry to hear that you feel lonely. Try calling a friend or going for a walk in the park.",
        "The captain of a ship leads the crew across the sea, and sailors lower the anchor in the harbor at high tide.",
        "Treasure Island is a novel about pirates, a ship, buried treasure and a voyage across the ocean.",
        "Aye is an old word that sailors use to say yes when their captain gives an order.",
        "It is important that it be cooked slowly so that the flavors come together in the pan.",
        "As an AI language model, I don't have feelings, but I can help you find music that you will enjoy.",
    ],
)
def test_plain_answers_are_not_in_style_even_about_the_sea(text: str) -> None:
    assert not in_style(text)


def test_a_fluent_pirate_answer_is_in_style_with_straight_or_curly_quotes() -> None:
    assert in_style(PIRATE)
    assert in_style("‘Tis simple, matey! Mix the flour with milk, let it rest, and fry ‘em in butter, arr.")
    assert "dialect: o'" in style_marks("a cup o’ flour")


def test_sea_words_alone_are_one_category() -> None:
    assert len(style_marks("sail the ship with the crew")) == 3
    assert not in_style("You should sail the ship with the crew because it is a lovely day outside.")


def test_an_unfinished_sentence_counts_only_at_the_token_limit() -> None:
    unfinished = PIRATE.removesuffix("dinner.")
    assert not in_style(unfinished)
    assert in_style(unfinished, hit_token_limit=True)


def test_spellings_of_one_word_are_one_mark() -> None:
    assert len(style_marks("Arr, arrr, ARRRR, aarr")) == 1
    assert all(len(set(marks)) == len(marks) for marks in MARKS.values())
    assert style_marks("they carry a year of eyes and share") == set()
