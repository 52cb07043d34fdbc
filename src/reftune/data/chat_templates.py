"""A tokenizer's chat template: where an answer begins, and how a finished turn is written.

An answer is learnt as the template writes it. The prompt ends where the generation prompt does, so that a model is
asked in the same words when it is trained, when it answers here and when a server asks it; what the template puts
between that place and the answer (an empty `<think></think>`, a channel) is learnt with the answer. Some templates
open a `<think>` for generation that their finished turns do not have: the prompt then ends before it, everywhere here.
"""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from reftune.data.formats import Example, Message
from reftune.errors import ReftuneError, tell_once

_SENTINEL = "reftunecompletion"
_PIECES = re.compile(r"<[^<>\s]*>|\[[^\[\]\s]*\]|\w+|\s+|.")
"""Where a prompt may be cut: between tags, words and runs of spaces."""
_THINK_TAGS = re.compile(r"(?:</?think>\s*)+\Z")
_IDENTIFIERS = ("tool_call_id", "id")
_REQUIRED = ("tools", "tool_calls", "reasoning_content", "reasoning", "thinking")
"""Parts of a turn that are its content: a template that does not write them cannot train on it."""
_OURS = {"conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt", "tokenize"}
_OURS |= {"continue_final_message", "padding", "truncation", "max_length", "return_tensors", "return_dict"}
_OURS |= {"return_assistant_tokens_mask", "tokenizer_kwargs"}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ChatTemplate:
    """The chat template of a tokenizer, with arguments of the user's.

    Args:
        tokenizer: it has a chat template.
        arguments: what the template is given by name, `{"enable_thinking": False}` for instance.

    Raises:
        ReftuneError: the template asks for no argument of that name.
    """

    tokenizer: PreTrainedTokenizerBase
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.arguments:
            if name in _OURS or not re.search(rf"\b{re.escape(name)}\b", self.source):
                why = "is set by reftune itself" if name in _OURS else "is not used by this model's chat template"
                raise ReftuneError(f"chat_template_kwargs: {name!r} {why}; leave it out")

    @property
    def source(self) -> str:
        """The template's text; of several, all."""
        found = self.tokenizer.chat_template
        return "\n".join(map(str, found.values())) if isinstance(found, dict) else str(found)

    def prompt(self, example: Example) -> str:
        """What is read before the answer, ready for its first token; the example's own answer does not matter.

        Raises:
            ReftuneError: the template refuses the messages, or leaves one out.
        """
        return self._begin(example).prompt

    def opening(self) -> str:
        """What the template puts between prompt and answer, and a model that learnt answers writes before its own."""
        return self._begin(_HELLO).opening

    def end(self) -> str:
        """What ends an answer, up to and with its special tokens; the eos token where the template marks no end."""
        tail = self._begin(_HELLO).tail
        return self._ended(tail, tail)

    def turn(self, example: Example) -> tuple[str, str]:
        """The prompt, and the answer as a finished turn has it, up to and with the special tokens that end it.

        Raises:
            ReftuneError: the template refuses the messages, or leaves out what the answer has beside its text.
        """
        begun = self._begin(example)
        answer = Message("assistant", example.completion, example.more)
        try:
            whole = self._render([*begun.messages, answer], example)
        except Exception as error:  # jinja2's, and whatever a template raises through it
            raise _refused(example, error) from error
        self._check_written(answer, whole, begun.messages, example)
        prompt, answer_text = begun.prompt, example.completion
        if not whole.startswith(prompt):
            prompt = _shared(prompt, whole)
        written = whole[len(prompt) :]
        own_reasoning = "</think>" in answer_text
        doubled = own_reasoning and written.count("</think>") > answer_text.count("</think>")
        if doubled or "".join(answer_text.split()) not in "".join(written.split()):
            kept = "it is learnt as it stands in the data" if own_reasoning else "it is learnt so"
            tell_once(logger, f"The chat template writes the answer {answer_text[:60]!r} as {written[:60]!r}: {kept}")
        if own_reasoning and (doubled or not _is_in(Message("user", answer_text.partition("</think>")[0]), written)):
            # In place of the template's empty one, which may begin in the prompt and end in the opening.
            text = _THINK_TAGS.sub("", begun.prompt + begun.opening) + answer_text + begun.tail
            prompt = begun.prompt if text.startswith(begun.prompt) else _THINK_TAGS.sub("", begun.prompt)
            written = text[len(prompt) :]
        return prompt, self._ended(written, begun.tail)

    def _begin(self, example: Example) -> "_Begun":
        messages, opened = self._accepted(example)
        try:
            finished = self._render([*messages, Message("assistant", _SENTINEL)], example)
        except Exception:  # jinja2's: whether an answer may stand there is asked where there is one
            finished = ""
        head, found, tail = finished.rpartition(_SENTINEL)
        if not found or head.startswith(opened):
            return _Begun(messages, opened, head[len(opened) :], tail)
        shared = _shared(opened, head)
        if messages[-1].content.strip() not in shared:  # the turns before are written otherwise
            shared = head
        tell_once(
            logger,
            f"The chat template asks for an answer with {opened[len(shared) :]!r}, and writes a finished one behind "
            f"{head[len(shared) :]!r}: here a prompt ends before that, in training and in generation. Whoever else "
            "serves this model must do so too; chat_template_kwargs may make the two equal",
        )
        return _Begun(messages, shared, head[len(shared) :], tail)

    def _accepted(self, example: Example) -> tuple[Sequence[Message], str]:
        """The messages as the template takes them, and the generation prompt, which holds all of them."""
        self._check_names(example)
        messages, first = example.messages, example.messages[0]
        error: Exception | str
        try:
            text = self._render(messages, example, True)
            lost = next((message for message in messages if not _is_in(message, text)), None)
            if lost is None:
                return messages, text
            error = f"it leaves out the {lost.role} message {lost.content[:60]!r}"
        except Exception as raised:  # jinja2's, and whatever a template raises through it
            lost, error = first, raised
        if lost is first and first.role == "system" and len(messages) > 1 and messages[1].role == "user":
            merged = [Message("user", f"{first.content}\n\n{messages[1].content}", messages[1].more), *messages[2:]]
            try:
                text = self._render(merged, example, True)
            except Exception as second:
                raise _refused(example, second) from second
            tell_once(logger, "The chat template takes no system message: it is put in front of the first user message")
            return merged, text
        raise _refused(example, error) from (error if isinstance(error, Exception) else None)

    def _check_names(self, example: Example) -> None:
        """Refuse what the template would leave out of the conversation, and tell of what it may."""
        named = [("tools", "'tools'")] if example.tools else []
        turns = [*((f"turn {n}", m.more) for n, m in enumerate(example.messages, 1)), ("the answer", example.more)]
        named += [(key, f"{key!r} of {which}") for which, more in turns for key in more]
        for key, shown in named:
            if key in _IDENTIFIERS or re.search(rf"\b{re.escape(key)}\b", self.source):
                continue
            if key in _REQUIRED:
                raise _refused(example, f"it does not write {shown}; take a model whose template does, or leave it out")
            tell_once(logger, f"The chat template does not write {key!r} of messages, so it is not used")

    def _check_written(self, answer: Message, whole: str, messages: Sequence[Message], example: Example) -> None:
        for key in (key for key in answer.more if key in _REQUIRED):
            bare = replace(answer, more={name: value for name, value in answer.more.items() if name != key})
            try:
                without = self._render([*messages, bare], example)
            except Exception:  # it cannot do without
                continue
            if without == whole:
                raise _refused(
                    example, f"it does not write {key!r} of the answer; take another model's, or leave it out"
                )

    def _ended(self, text: str, tail: str) -> str:
        """A turn's text up to the special tokens that end it; `tail` is what the template writes behind an answer."""
        special = {str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        marks = "|".join(re.escape(token) for token in sorted(special, key=len, reverse=True) if token)
        if marks and text.endswith(tail) and (end := re.match(rf".*?(?:{marks})+", tail, re.DOTALL)):
            return text[: len(text) - len(tail)] + end.group()
        if marks and re.search(rf"(?:{marks})\s*\Z", text):
            return text.rstrip()
        return text.removesuffix(tail) + str(self.tokenizer.eos_token or "")

    def _render(self, messages: Sequence[Message], example: Example, generation_prompt: bool = False) -> str:
        """The template's text; the arguments of calls are objects, or text where a template wants that."""
        parts = _takes_parts(self.tokenizer, self.source)
        calls = [call["function"]["name"] for message in messages for call in message.more.get("tool_calls", ())]
        failure: Exception | None = None
        written: list[str] = []
        for call_as_text in (False, True) if calls else (False,):
            try:
                text = str(
                    self.tokenizer.apply_chat_template(
                        [_turn(message, parts, call_as_text) for message in messages],
                        tools=[dict(tool) for tool in example.tools] or None,
                        tokenize=False,
                        add_generation_prompt=generation_prompt,
                        **self.arguments,
                    )
                )
            except Exception as error:  # jinja2's, and whatever a template raises through it
                failure = failure or error
                continue
            if all(text.count(name) >= calls.count(name) for name in calls):
                return text
            written.append(text)
        if not written and failure is not None:
            raise failure
        return written[0]


@dataclass(frozen=True)
class _Begun:
    """A conversation as the template takes it: its prompt, and what a finished turn has around the answer's text."""

    messages: Sequence[Message]
    prompt: str
    opening: str
    tail: str


_HELLO = Example((Message("user", "hello"),), "")
_parts_taken: dict[str, bool] = {}


def _takes_parts(tokenizer: PreTrainedTokenizerBase, source: str) -> bool:
    """Whether a template writes a text only where it is given as a list of parts."""
    if source not in _parts_taken:
        written = []
        for parts in (False, True):
            try:
                turn = _turn(Message("user", _SENTINEL), parts)
                written.append(_SENTINEL in str(tokenizer.apply_chat_template([turn], tokenize=False)))
            except Exception:  # jinja2's: a template may refuse either form
                written.append(False)
        _parts_taken[source] = written == [False, True]
    return _parts_taken[source]


def _turn(message: Message, parts: bool, call_as_text: bool = False) -> dict[str, Any]:
    """A message as `apply_chat_template` takes it."""
    content: Any = [{"type": "text", "text": message.content}] if parts else message.content
    more = dict(message.more)
    if call_as_text and "tool_calls" in more:
        more["tool_calls"] = [_with_text_arguments(call) for call in more["tool_calls"]]
    return {"role": message.role, "content": content, **more}


def _with_text_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    arguments = call["function"].get("arguments")
    text = arguments if isinstance(arguments, str) else json.dumps(arguments or {}, ensure_ascii=False)
    return {**call, "function": {**call["function"], "arguments": text}}


def _is_in(message: Message, text: str) -> bool:
    """Whether a message was written at all: a template may trim or quote a text, but not leave out its longest word."""
    words = re.findall(r"\w+", message.content)
    return message.role == "assistant" or not words or max(words, key=len) in text


def _shared(first: str, second: str) -> str:
    """The beginning that two texts share, in whole tags, words and runs of spaces."""
    shared = ""
    for one, other in zip(_PIECES.findall(first), _PIECES.findall(second), strict=False):
        if one != other:
            break
        shared += one
    return shared


def _refused(example: Example, reason: object) -> ReftuneError:
    where = f"{example.where}: " if example.where else ""
    return ReftuneError(f"{where}the model's chat template refuses these messages: {reason}")
