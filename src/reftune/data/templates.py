"""From messages to the prompt text: the tokenizer's chat template, or a template of the user's for raw models."""

import logging
import re
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from reftune.data.formats import Example, Message
from reftune.errors import ReftuneError

DEFAULT_TEMPLATE = "User: {prompt}\nAssistant:\n"
"""Used where the tokenizer has no chat template and none is given."""

_PLACEHOLDER = re.compile(r"%s|\{prompt\}|\{system\}")
_SENTINEL = "reftunecompletion"

logger = logging.getLogger(__name__)
_already_logged: set[str] = set()


def resolve_template(tokenizer: PreTrainedTokenizerBase, template: str | None) -> str | None:
    """Return the raw template to fill, or None where the tokenizer's chat template is used.

    Raises:
        ReftuneError: `template` does not hold exactly one `%s` or `{prompt}`.
    """
    if template is None:
        if tokenizer.chat_template:
            return None
        _log_once(f"The tokenizer has no chat template and none was given: prompts become {DEFAULT_TEMPLATE!r}")
        return DEFAULT_TEMPLATE
    slots = [slot for slot in _PLACEHOLDER.findall(template) if slot != "{system}"]
    if len(slots) != 1:
        raise ReftuneError(f"template={template!r} has {len(slots)} places for the prompt: write %s or {{prompt}} once")
    return template


def render_prompt(
    example: Example | Sequence[Message] | str,
    tokenizer: PreTrainedTokenizerBase,
    template: str | None = None,
    system_prompt: str | None = None,
) -> str:
    r"""Return the text that the model reads before its completion, ready for the first token of the answer.

    Args:
        example: an example, its messages, or a single user message as text.
        tokenizer: its chat template is used where `template` is None.
        template: text with one `%s` or `{prompt}` for the user's turn, and optionally `{system}`; without `{system}` a
            system text is put in front, followed by a blank line. History is written with the same template, each
            answer closed as completions are (`turn_end`).
        system_prompt: used where the example has no system message of its own.

    Raises:
        ReftuneError: the template has no place for the prompt, or the chat template refuses these messages.
    """
    messages = _messages_of(example, system_prompt)
    raw = resolve_template(tokenizer, template)
    if raw is None:
        return _chat(messages, tokenizer, example)
    system = "\n\n".join(message.content for message in messages if message.role == "system")
    text = f"{system}\n\n" if system and "{system}" not in raw else ""
    closing, first = turn_end(tokenizer, template), True
    for message in messages:
        if message.role == "user":
            text += _fill(raw, message.content, system if first else "")
            first = False
        elif message.role == "assistant":
            text += message.content + closing + "\n"
        elif message.role == "tool":
            text += message.content + "\n"
    return text


def turn_end(tokenizer: PreTrainedTokenizerBase, template: str | None = None) -> str:
    """Return the text that ends an assistant turn, up to and including its special token (`<|im_end|>`, `</s>`, ...).

    With a raw template, or a chat template that marks no end, it is the eos token (empty where there is none).
    """
    eos = str(tokenizer.eos_token or "")
    if resolve_template(tokenizer, template) is not None:
        return eos
    messages = [Message("user", "hello"), Message("assistant", _SENTINEL)]
    tail = _apply(messages, tokenizer, add_generation_prompt=False).rpartition(_SENTINEL)[2].lstrip()
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    ends = [tail.find(token) + len(token) for token in special if token and token in tail]
    return tail[: min(ends)] if ends else eos


def _messages_of(example: Example | Sequence[Message] | str, system_prompt: str | None) -> list[Message]:
    if isinstance(example, str):
        messages = [Message("user", example)]
    else:
        messages = list(example.messages if isinstance(example, Example) else example)
    if system_prompt and not any(message.role == "system" for message in messages):
        messages.insert(0, Message("system", system_prompt))
    return messages


def _fill(template: str, prompt: str, system: str) -> str:
    # One pass, so that braces or %s inside the prompt stay as they are.
    return _PLACEHOLDER.sub(lambda found: system if found.group() == "{system}" else prompt, template)


def _chat(messages: list[Message], tokenizer: PreTrainedTokenizerBase, example: Any) -> str:
    try:
        return _apply(messages, tokenizer)
    except Exception as error:  # jinja2's errors, and whatever the template raises through them
        where = f"{example.where}: " if isinstance(example, Example) and example.where else ""
        if messages[0].role != "system" or len(messages) < 2 or messages[1].role != "user":
            raise ReftuneError(f"{where}the model's chat template refuses these messages: {error}") from error
        merged = Message("user", f"{messages[0].content}\n\n{messages[1].content}")
        try:
            text = _apply([merged, *messages[2:]], tokenizer)
        except Exception as second:
            raise ReftuneError(f"{where}the model's chat template refuses these messages: {second}") from second
        _log_once("The chat template takes no system message: it is put in front of the first user message")
        return text


def _apply(messages: list[Message], tokenizer: PreTrainedTokenizerBase, add_generation_prompt: bool = True) -> str:
    turns = [{"role": message.role, "content": message.content} for message in messages]
    return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=add_generation_prompt))


def _log_once(line: str) -> None:
    if line not in _already_logged:
        _already_logged.add(line)
        logger.warning(line)
