import logging

import pytest
from transformers import PreTrainedTokenizerFast

from reftune import errors
from reftune.data.formats import Example, Message
from reftune.data.templates import DEFAULT_TEMPLATE, render_prompt, turn_end
from reftune.errors import ReftuneError

TALK = Example((Message("user", "a"), Message("assistant", "b"), Message("user", "c")), "d", "f.csv, row 2")


def test_the_chat_template_ends_where_the_answer_begins(chatml: PreTrainedTokenizerFast) -> None:
    assert render_prompt("hi", chatml) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert render_prompt(TALK, chatml).count("<|im_start|>assistant\n") == 2


def test_the_system_prompt_yields_to_a_row_that_has_its_own(chatml: PreTrainedTokenizerFast) -> None:
    assert render_prompt("hi", chatml, system_prompt="Be kind").startswith("<|im_start|>system\nBe kind<|im_end|>")
    own = [Message("system", "Own"), Message("user", "hi")]
    assert "Be kind" not in render_prompt(own, chatml, system_prompt="Be kind")


def test_a_raw_template_is_filled_once_and_leaves_the_text_alone(chatml: PreTrainedTokenizerFast) -> None:
    assert render_prompt("use {system} and %s", chatml, "Q: %s\nA:") == "Q: use {system} and %s\nA:"
    assert render_prompt("hi", chatml, '{"q": "{prompt}"}') == '{"q": "hi"}'


def test_a_raw_template_places_the_system_text(chatml: PreTrainedTokenizerFast) -> None:
    assert render_prompt("hi", chatml, "<{system}> {prompt}", "S") == "<S> hi"
    assert render_prompt("hi", chatml, "<{system}> {prompt}") == "<> hi"
    assert render_prompt("hi", chatml, "Q: %s", "S") == "S\n\nQ: hi"


def test_history_in_a_raw_template_is_closed_as_completions_are(raw_bos: PreTrainedTokenizerFast) -> None:
    assert render_prompt(TALK, raw_bos, "Q: %s A: ") == "Q: a A: b</s>\nQ: c A: "


def test_without_any_template_the_default_is_used_and_logged_once(
    raw_bos: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(errors, "_told", set())
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert render_prompt("hi", raw_bos) == DEFAULT_TEMPLATE.replace("{prompt}", "hi")
    assert [record.getMessage() for record in caplog.records if "no chat template" in record.getMessage()] == [
        f"The tokenizer has no chat template and none was given: prompts become {DEFAULT_TEMPLATE!r}"
    ]


def test_a_chat_template_without_system_role_gets_it_in_the_user_turn(
    chat_bos: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(errors, "_told", set())
    assert render_prompt("hi", chat_bos, system_prompt="S") == "<s>[INST] S\n\nhi [/INST]"
    assert "takes no system message" in caplog.text


def test_a_refused_conversation_names_its_row(chat_bos: PreTrainedTokenizerFast) -> None:
    odd = Example((Message("user", "a"), Message("system", "S")), "b", "f.csv, row 7")
    with pytest.raises(ReftuneError, match=r"f\.csv, row 7: the model's chat template refuses .*no system role"):
        render_prompt(odd, chat_bos)


@pytest.mark.parametrize("template", ["no place", "%s and %s", "%s and {prompt}", "{system}", ""])
def test_a_template_needs_one_place_for_the_prompt(chatml: PreTrainedTokenizerFast, template: str) -> None:
    with pytest.raises(ReftuneError, match=r"write %s or \{prompt\} once"):
        render_prompt("hi", chatml, template)


def test_the_end_of_a_turn_is_the_templates_or_eos(
    chatml: PreTrainedTokenizerFast, raw_bos: PreTrainedTokenizerFast, chat_bos: PreTrainedTokenizerFast
) -> None:
    assert turn_end(chatml) == "<|im_end|>"
    assert turn_end(chat_bos) == "</s>"
    assert turn_end(raw_bos) == "</s>"
    assert turn_end(chatml, "Q: %s") == "<|im_end|>"
