from __future__ import annotations

import pytest

from reftune.data.formats import Message
from reftune.errors import ReftuneError
from reftune.inference.chat import Conversation
from reftune.inference.generation import GenerationSettings, generate_answers
from reftune.inference.loading import EditedModel
from tests.inference.edited import tiny_edited

SETTINGS = GenerationSettings(max_new_tokens=8)


@pytest.fixture(scope="module")
def edited(tmp_path_factory: pytest.TempPathFactory) -> EditedModel:
    return tiny_edited(tmp_path_factory.mktemp("model"))


def test_the_stream_is_what_generate_writes(edited: EditedModel) -> None:
    talk = Conversation(edited, SETTINGS)
    said = "".join(talk.ask("hi"))
    assert said.strip() == next(generate_answers(edited, ["hi"], SETTINGS)).text


def test_a_later_turn_reads_the_whole_conversation_as_one_prompt(edited: EditedModel) -> None:
    talk = Conversation(edited, SETTINGS)
    first = "".join(talk.ask("hi")).strip()
    second = "".join(talk.ask("and?")).strip()
    history = [Message("user", "hi"), Message("assistant", first), Message("user", "and?")]
    assert second == next(generate_answers(edited, [history], SETTINGS)).text
    assert [turn.role for turn in talk.turns] == ["user", "assistant", "user", "assistant"]


def test_base_switches_the_edit_off_for_the_next_answer(edited: EditedModel) -> None:
    talk = Conversation(edited, SETTINGS)
    talk.uses_edit = False
    said = "".join(talk.ask("hi")).strip()
    assert said == next(generate_answers(edited, ["hi"], SETTINGS, base=True)).text
    assert said != next(generate_answers(edited, ["hi"], SETTINGS)).text


def test_breaking_an_answer_off_keeps_what_was_said(edited: EditedModel) -> None:
    talk = Conversation(edited, GenerationSettings(max_new_tokens=150))
    answer = talk.ask("hi")
    piece = next(answer)
    answer.close()
    assert talk.turns[-1] == Message("assistant", piece.strip())
    assert len("".join(talk.ask("again"))) > 0


def test_a_conversation_that_outgrows_the_context_loses_its_oldest_turns(edited: EditedModel) -> None:
    talk = Conversation(edited, SETTINGS)
    for _ in range(4):
        list(talk.ask("some words " * 5))
    assert talk.forgotten > 0
    assert talk.turns[0].role == "user"


def test_a_turn_that_cannot_fit_is_refused_and_forgotten(edited: EditedModel) -> None:
    talk = Conversation(edited, SETTINGS)
    with pytest.raises(ReftuneError, match="tokens"):
        next(talk.ask("word " * 100))
    assert talk.turns == []
