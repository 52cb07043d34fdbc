"""From messages to the prompt text: the tokenizer's chat template, or a template of the user's for raw models."""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from reftune.data.chat_templates import ChatTemplate
from reftune.data.formats import Example, Message
from reftune.errors import ReftuneError, tell_once

DEFAULT_TEMPLATE = "User: {prompt}\nAssistant:\n"
"""Used where the tokenizer has no chat template and none is given."""

_PLACEHOLDER = re.compile(r"%s|\{prompt\}|\{system\}")

logger = logging.getLogger(__name__)


def resolve_template(tokenizer: PreTrainedTokenizerBase | None, template: str | None) -> str | None:
    """Return the raw template to fill, or None where the tokenizer's chat template is used.

    Raises:
        ReftuneError: `template` does not hold exactly one `%s` or `{prompt}`.
    """
    if template is None:
        if tokenizer is not None and tokenizer.chat_template:
            return None
        tell_once(logger, f"The tokenizer has no chat template and none was given: prompts become {DEFAULT_TEMPLATE!r}")
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
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> str:
    r"""Return the text that the model reads before its completion, ready for the first token of the answer.

    Args:
        example: an example, its messages, or a single user message as text.
        tokenizer: its chat template is used where `template` is None.
        template: text with one `%s` or `{prompt}` for the user's turn, and optionally `{system}`; without `{system}` a
            system text is put in front, followed by a blank line. History is written with the same template, each
            answer closed as completions are (`turn_end`).
        system_prompt: used where the example has no system message of its own.
        chat_template_kwargs: arguments of the chat template, `{"enable_thinking": False}` for instance.

    Raises:
        ReftuneError: the template has no place for the prompt, or the chat template refuses these messages.
    """
    asked, raw = _example(example, system_prompt), resolve_template(tokenizer, template)
    if raw is None:
        return ChatTemplate(tokenizer, chat_template_kwargs or {}).prompt(asked)
    return _raw_prompt(asked, raw, str(tokenizer.eos_token or ""))


def render_turn(
    example: Example,
    tokenizer: PreTrainedTokenizerBase,
    template: str | None = None,
    system_prompt: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> tuple[str, str]:
    """Return `render_prompt`'s text, and the completion as the model has to write it, with the end of its turn."""
    asked, raw = _example(example, system_prompt), resolve_template(tokenizer, template)
    if raw is None:
        return ChatTemplate(tokenizer, chat_template_kwargs or {}).turn(asked)
    eos = str(tokenizer.eos_token or "")
    return _raw_prompt(asked, raw, eos), example.completion + eos


def behind(turns: Sequence[Message], example: Any, system_prompt: str | None) -> Example:
    """A prompt behind other turns; what these, the prompt or `system_prompt` say as the system is one message."""
    own = _example(example, system_prompt)
    messages = (*turns, *own.messages)
    system = "\n\n".join(message.content for message in messages if message.role == "system")
    rest = [message for message in messages if message.role != "system"]
    return replace(own, messages=(*([Message("system", system)] if system else []), *rest))


def turn_end(tokenizer: PreTrainedTokenizerBase, template: str | None = None) -> str:
    """Return the text that ends an assistant turn, up to and including its special token (`<|im_end|>`, `</s>`, ...).

    With a raw template, or a chat template that marks no end, it is the eos token (empty where there is none).
    """
    if resolve_template(tokenizer, template) is not None:
        return str(tokenizer.eos_token or "")
    return ChatTemplate(tokenizer).end()


def turn_opening(
    tokenizer: PreTrainedTokenizerBase,
    template: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> str:
    """Return what the chat template puts between prompt and answer, an empty `<think></think>` for instance."""
    if resolve_template(tokenizer, template) is not None:
        return ""
    return ChatTemplate(tokenizer, chat_template_kwargs or {}).opening()


def _example(example: Example | Sequence[Message] | str, system_prompt: str | None) -> Example:
    if isinstance(example, str):
        example = Example((Message("user", example),), "")
    elif not isinstance(example, Example):
        example = Example(tuple(example), "")
    if system_prompt and not any(message.role == "system" for message in example.messages):
        example = replace(example, messages=(Message("system", system_prompt), *example.messages))
    return example


def _raw_prompt(example: Example, raw: str, eos: str) -> str:
    for more in (example.more, *(message.more for message in example.messages), {"tools": example.tools}):
        for key in ("tools", "tool_calls", "reasoning_content", "reasoning", "thinking"):
            if more.get(key):
                where = f"{example.where}: " if example.where else ""
                raise ReftuneError(
                    f"{where}a template of text cannot write {key!r}: use a chat template, or leave it out"
                )
    messages = example.messages
    system = "\n\n".join(message.content for message in messages if message.role == "system")
    text = f"{system}\n\n" if system and "{system}" not in raw else ""
    first = True
    for message in messages:
        if message.role == "user":
            text += _fill(raw, message.content, system if first else "")
            first = False
        elif message.role == "assistant":
            text += message.content + eos + "\n"
        elif message.role == "tool":
            text += message.content + "\n"
    return text


def _fill(template: str, prompt: str, system: str) -> str:
    # One pass, so that braces or %s inside the prompt stay as they are.
    return _PLACEHOLDER.sub(lambda found: system if found.group() == "{system}" else prompt, template)
