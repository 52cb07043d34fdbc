"""Answers are learnt as chat templates write them; the 72 that TRL installs are the ones to be equal to."""

import copy
import importlib.util
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from reftune import errors
from reftune.data.chat_templates import ChatTemplate
from reftune.data.formats import Example, Message, read_examples
from reftune.data.tokenising import IGNORED, Encoding, encode_example
from reftune.errors import ReftuneError
from tests.data.tiny_tokenizers import chatml_tokenizer

_TRL = importlib.util.find_spec("trl")
assert _TRL is not None and _TRL.origin is not None
FOLDER = Path(_TRL.origin).parent / "chat_templates"
NAMES = sorted(file.stem for file in FOLDER.glob("*.jinja"))
TALK = (Message("user", "First 1"), Message("assistant", "Reply 1"), Message("user", "Last 2"))
ANSWER = "The answer."
OWN = "<think>\nbecause of it\n</think>\n\nThe answer."
WARNING = [
    "deepseek_r1_distill", "deepseek_r1_distill_training", "deepseekv3", "deepseekv3_training",
    *(f"nemotron_3_{size}{kind}" for size in ("5_lightning", "nano", "super", "ultra") for kind in ("", "_training")),
]  # fmt: skip
"""They open a `<think>` for generation that a finished turn does not have."""
NOT_THE_GENERATION_PROMPT = [
    *WARNING, "glm4moe", "glm4moe_training", "gptoss", "gptoss_training", "muse_glimmer", "muse_glimmer_training",
    "qwen3", "qwen3_training", *(f"qwen3_{v}{kind}" for v in ("5_think", "6", "8") for kind in ("", "_training")),
    *(f"{name}{kind}" for name in ("idefics3", "llava_next", "smolvlm") for kind in ("", "_training")),
]  # fmt: skip
"""A finished turn has something else before its answer: what was trained before turns were rendered whole."""
PARTS = ("idefics3", "llava_next", "smolvlm")

BASE = chatml_tokenizer()


def _tokenizer(name: str) -> PreTrainedTokenizerFast:
    tokenizer = copy.copy(BASE)
    tokenizer.chat_template = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    return tokenizer


def _own_rendering(name: str, messages: tuple[Message, ...], generation_prompt: bool = False) -> str:
    parts = name.startswith(PARTS)
    turns = [
        {"role": m.role, "content": [{"type": "text", "text": m.content}] if parts else m.content} for m in messages
    ]
    tokenizer: Any = _tokenizer(name)
    return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=generation_prompt))


@pytest.fixture(autouse=True)
def _told(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(errors, "_told", set())
    yield


def test_trl_installs_the_templates_that_are_listed_here() -> None:
    assert len(NAMES) == 72
    assert set(WARNING) <= set(NOT_THE_GENERATION_PROMPT) <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_learnt_is_the_templates_own_rendering(name: str, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = _tokenizer(name)
    with caplog.at_level(logging.WARNING):
        rows = [encode_example(Example(TALK, ANSWER), tokenizer) for _ in range(2)]
    text, whole = tokenizer.decode(rows[0]["input_ids"]), _own_rendering(name, (*TALK, Message("assistant", ANSWER)))
    assert text.partition(ANSWER)[0] == whole.partition(ANSWER)[0], "up to the answer"
    assert text.removesuffix("<|im_end|>") in whole, "no special token of this tokenizer is in most of these templates"
    warned = [record.getMessage() for record in caplog.records if "asks for an answer with" in record.getMessage()]
    assert len(warned) == (name in WARNING), "once for two rows, and only where there is a difference to name"
    assert all("think" in line or r"'\n'" in line for line in warned)


@pytest.mark.parametrize("name", NAMES)
def test_the_generation_prompt_before_an_answer_is_no_finished_turn_in_these_templates(name: str) -> None:
    """The control: it shows for which templates the rule of old, generation prompt and answer, was wrong."""
    of_old = _own_rendering(name, TALK, generation_prompt=True) + ANSWER
    whole = _own_rendering(name, (*TALK, Message("assistant", ANSWER)))
    assert whole.startswith(of_old) == (name not in NOT_THE_GENERATION_PROMPT)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_is_asked_as_it_was_trained(name: str) -> None:
    tokenizer = _tokenizer(name)
    row = encode_example(Example(TALK, ANSWER), tokenizer)
    assert Encoding(tokenizer).prompt_ids([TALK]) == [row["input_ids"][: row["prompt_length"]]]
    opened = _own_rendering(name, TALK, generation_prompt=True)
    asked = Encoding(tokenizer).render(list(TALK))
    assert asked == opened if name not in WARNING else opened.startswith(asked)


@pytest.mark.parametrize("name", NAMES)
def test_reasoning_of_the_datas_own_is_learnt_once(name: str) -> None:
    tokenizer = _tokenizer(name)
    row = encode_example(Example(TALK, OWN), tokenizer)
    turn = tokenizer.decode(row["input_ids"]).rpartition("Last 2")[2]
    assert turn.count("<think>") == turn.count("</think>") == turn.count("because of it") == 1
    assert turn.index("<think>") < turn.index("because of it") < turn.index("</think>") < turn.index(ANSWER)
    learnt = tokenizer.decode([label for label in row["labels"] if label != IGNORED])
    assert "because of it\n</think>" in learnt or "because of it</think>" in learnt
    assert learnt.removesuffix("<|im_end|>").rstrip("<|>a-z_").count(ANSWER) == 1


def test_reasoning_of_the_datas_own_follows_a_generation_prompt_that_opens_it_with_nothing_between() -> None:
    example = Example((Message("user", "Hi"),), "<think>\nbecause\n</think>\n\nA")
    prompt, answer = ChatTemplate(_tokenizer("qwen3_8")).turn(example)
    assert (prompt + answer).endswith("assistant\n<think>\nbecause\n</think>\n\nA<|im_end|>")


@pytest.mark.parametrize("name", ["qwen3", "gptoss", "glm4moe", "nemotron_3_nano", "idefics3", "llama3"])
def test_an_answer_is_shown_without_what_the_template_puts_before_it(name: str) -> None:
    encoding = Encoding(_tokenizer(name))
    row = encode_example(Example(TALK, ANSWER), encoding.tokenizer)
    learnt = [label for label in row["labels"] if label != IGNORED and label != BASE.eos_token_id]
    shown = encoding.answer_text(learnt)
    assert shown.startswith(ANSWER) and "think" not in shown


def test_arguments_reach_the_template_and_unknown_ones_are_refused() -> None:
    tokenizer = _tokenizer("qwen3")
    encoding = Encoding(tokenizer, chat_template_kwargs={"enable_thinking": False})
    assert encoding.render("Hi").endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert Encoding(tokenizer).render("Hi").endswith("<|im_start|>assistant\n")
    row = encode_example(Example(TALK, ANSWER), tokenizer, chat_template_kwargs={"enable_thinking": False})
    assert tokenizer.decode(row["input_ids"][row["prompt_length"] :]) == ANSWER + "<|im_end|>"
    with pytest.raises(ReftuneError, match="chat_template_kwargs: 'enable_thinkng' is not used by this model's chat"):
        Encoding(tokenizer, chat_template_kwargs={"enable_thinkng": False}).render("Hi")
    with pytest.raises(ReftuneError, match="chat_template_kwargs: 'tokenize' is set by reftune"):
        Encoding(tokenizer, chat_template_kwargs={"tokenize": True}).render("Hi")
    with pytest.raises(ReftuneError, match="no chat template is used"):
        Encoding(tokenizer, "Q: %s", chat_template_kwargs={"enable_thinking": False})


CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "What the sky does"}}]
CALLING = {
    "messages": [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "sunny", "tool_call_id": "1"},
        {"role": "assistant", "content": "It is sunny."},
    ],
    "tools": TOOLS,
}
SHAREGPT_CALLING = {
    "conversations": [
        {"from": "human", "value": "Weather?"},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Paris"}}'},
        {"from": "observation", "value": "sunny"},
        {"from": "gpt", "value": "It is sunny."},
    ],
    "tools": '[{"type": "function", "function": {"name": "weather", "description": "What the sky does"}}]',
}


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "glm4moe", "gptoss", "llama3_1"])
@pytest.mark.parametrize("row", [CALLING, SHAREGPT_CALLING], ids=["openai", "sharegpt"])
def test_calls_of_tools_are_learnt_and_read_as_the_template_writes_them(name: str, row: dict[str, Any]) -> None:
    tokenizer = _tokenizer(name)
    calling, answering = (tokenizer.decode(encode_example(e, tokenizer)["input_ids"]) for e in read_examples([row]))
    learnt = encode_example(read_examples([row])[0], tokenizer)
    assert '"Paris"' in tokenizer.decode([i for i in learnt["labels"] if i != IGNORED]) or "Paris</arg" in calling
    assert "weather" in calling and "None" not in calling and r"\"city" not in calling
    assert "sunny" in answering and answering.index("Paris") < answering.index("It is sunny.")
    assert "What the sky does" in calling


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "a", "completion": "b", "tools": TOOLS}, "row 1: the model's chat template refuses these messages: it does not write 'tools'; take"),
        ({"messages": CALLING["messages"]}, "row 1: .*does not write 'tool_calls' of"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "reasoning_content": "c"}]},
         "row 1: .*does not write 'reasoning_content' of the answer"),
    ],
)  # fmt: skip
def test_what_the_template_does_not_write_is_refused_by_name_and_row(row: dict[str, Any], words: str) -> None:
    with pytest.raises(ReftuneError, match=words):
        for example in read_examples([row]):
            encode_example(example, BASE)
    with pytest.raises(ReftuneError, match="row 1: a template of text cannot write"):
        for example in read_examples([row]):
            encode_example(example, BASE, template="Q: %s\nA:")


def test_reasoning_in_a_field_of_its_own_is_written_where_the_template_has_a_place() -> None:
    turn = {"role": "assistant", "content": "b", "reasoning_content": "since c"}
    (example,) = read_examples([{"messages": [{"role": "user", "content": "a"}, turn]}])
    assert "<think>\nsince c\n</think>\n\nb" in ChatTemplate(_tokenizer("qwen3")).turn(example)[1]


def test_other_keys_of_a_turn_are_told_once_unless_the_template_writes_them(caplog: pytest.LogCaptureFixture) -> None:
    turns = [{"role": "user", "content": "a", "mood": "kind"}, {"role": "assistant", "content": "b", "id": "7"}]
    with caplog.at_level(logging.WARNING):
        for example in read_examples([{"messages": turns}] * 3):
            encode_example(example, BASE)
    told = [record.getMessage() for record in caplog.records]
    assert told == ["The chat template does not write 'mood' of messages, so it is not used"]


def test_a_template_that_leaves_a_message_out_is_not_trained_on() -> None:
    tokenizer = copy.copy(BASE)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{{ m.content }}<|im_end|>"
        "{% elif m.role == 'assistant' %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    )
    assert "Be kind" in Encoding(tokenizer, system_prompt="Be kind").render("Hi"), "put before the user's turn"
    lost = Example((Message("user", "Hi"), Message("tool", "sunny")), "b", "f.csv, row 2")
    with pytest.raises(ReftuneError, match="f.csv, row 2: .*leaves out the tool message 'sunny'"):
        encode_example(lost, tokenizer)
