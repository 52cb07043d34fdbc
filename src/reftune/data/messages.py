"""One turn of a conversation: whose it is, what it says, what else the chat template writes, and whether it is learnt.

Both spellings are read, {"role", "content"} and {"from", "value"}, and of calls of tools both OpenAI's and ShareGPT's.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from reftune.data.values import parse_json
from reftune.errors import ReftuneError

ROLES = ("system", "user", "assistant", "tool")
_ROLE_NAMES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant",
    "function_call": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool", "function_response": "tool",
}  # fmt: skip
_LEARNT = ("weight", "loss", "train")
"""Keys by which other libraries leave a turn out of what is learnt."""


@dataclass(frozen=True)
class Message:
    """One turn.

    Attributes:
        role: one of `ROLES`.
        content: its text.
        more: what else the chat template may write: `tool_calls`, `reasoning_content`, `name`, ...
        learnt: whether an assistant's turn is learnt where the data would have it so; False leaves it as context.
    """

    role: str
    content: str
    more: Mapping[str, Any] = field(default_factory=dict, hash=False, repr=False)
    learnt: bool = field(default=True, compare=False, repr=False)

    @property
    def empty(self) -> bool:
        """Whether there is nothing to write: no text and no call of a tool."""
        return not self.content.strip() and "tool_calls" not in self.more


def read_message(item: Any, where: str) -> Message:
    """A turn as a row has it.

    Raises:
        ReftuneError: naming the row, the turn and its key.
    """
    if not isinstance(item, Mapping):
        raise ReftuneError(f"{where} is a {type(item).__name__}; give an object with 'role' and 'content'")
    role_key, content_key = ("from", "value") if "from" in item else ("role", "content")
    calls = [key for key in ("tool_calls", "function_call") if item.get(key)]
    for key in (role_key, *(() if calls else (content_key,))):
        if key not in item:
            raise ReftuneError(f"{where} has no {key!r}; it has: {', '.join(map(str, item))}")
    said = str(item[role_key]).lower()
    role = _ROLE_NAMES.get(said)
    if role is None:
        raise ReftuneError(f"{where}: {role_key}={item[role_key]!r} is not a role; use one of {', '.join(ROLES)}")
    content = item.get(content_key)
    if content is None and role != "assistant":
        raise ReftuneError(f"{where}: {content_key!r} of the {role} is missing; write a text or delete the turn")
    if isinstance(content, list):  # OpenAI's content parts
        for part in content:
            if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
                raise ReftuneError(f"{where}.{content_key} has a part that is not text; only text is trained on")
        content = "".join(part["text"] for part in content)
    more = {
        key: value
        for key, value in item.items()
        if key not in (role_key, content_key, *_LEARNT) and value not in (None, "", [], {})
    }
    if said == "function_call":
        more["tool_calls"], content = [_call(content, f"{where}.{content_key}")], ""
    elif "function_call" in more:
        more["tool_calls"] = [_call(more.pop("function_call"), f"{where}.function_call")]
    elif "tool_calls" in more:
        listed = more["tool_calls"] = _objects(more["tool_calls"], f"{where}.tool_calls")
        more["tool_calls"] = [_call(call, f"{where}.tool_calls[{index}]") for index, call in enumerate(listed)]
    return Message(role, as_text(content, f"{where}.{content_key}"), more, _learnt(item, where))


def read_tools(value: Any, where: str, wrapped: bool = True) -> tuple[Mapping[str, Any], ...]:
    """The tools that a row offers: a list of objects, or JSON of one.

    Args:
        value: of the field `tools`, or of OpenAI's older `functions`.
        where: row and field.
        wrapped: whether they stand as the template wants them; False puts each under `function`.

    Raises:
        ReftuneError: they are something else.
    """
    if value in (None, "", [], {}) or (isinstance(value, str) and value.strip() in ("[]", "{}", "null")):
        return ()
    tools = _objects(value, where)
    return tuple(tools if wrapped else ({"type": "function", "function": tool} for tool in tools))


def as_text(value: Any, where: str) -> str:
    """A field's text; "" where it is missing, and a number written out.

    Raises:
        ReftuneError: it is something else.
    """
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, (int, float, Decimal)) and not isinstance(value, bool):
        return str(value)
    raise ReftuneError(f"{where} is a {type(value).__name__}; give text")


def left_out(row: Mapping[str, Any]) -> bool:
    """Whether a row says of itself that it is not to be learnt: `weight: 0`, `loss: false`, `train: false`."""
    return any(str(row.get(key, 1)).strip().lower() in ("0", "0.0", "false") for key in _LEARNT)


def _learnt(item: Mapping[str, Any], where: str) -> bool:
    for key in _LEARNT:
        value = item.get(key)
        if value is not None and value not in (0, 1):
            raise ReftuneError(f"{where}: {key}={value!r}: 1 (or true) learns a turn and 0 (or false) leaves it out")
        if value is not None and not value:
            return False
    return True


def _call(value: Any, where: str) -> dict[str, Any]:
    """A call as templates take it: {"type", "function": {"name", "arguments"}}, the arguments an object."""
    call = dict(_objects(value, where)[0])
    inner = dict(_objects(call["function"], f"{where}.function")[0]) if "function" in call else call
    if not isinstance(inner.get("name"), str):
        raise ReftuneError(f"{where} names no function: give {{'name': ..., 'arguments': ...}}")
    if isinstance(arguments := inner.get("arguments"), str):
        try:
            read = parse_json(arguments, f"{where}.arguments")
        except json.JSONDecodeError:
            read = None
        inner["arguments"] = read if isinstance(read, dict) else arguments
    return call | {"function": inner} if "function" in call else {"type": "function", "function": inner}


def _objects(value: Any, where: str) -> list[Any]:
    """A list of objects: given so, as a single one, or as JSON of either."""
    if isinstance(value, str):
        try:
            value = parse_json(value, where)
        except json.JSONDecodeError as error:
            raise ReftuneError(f"{where} is a text and no JSON ({error.msg}); give objects") from error
    items = value if isinstance(value, list) else [value]
    items = [_objects(item, where)[0] if isinstance(item, str) else item for item in items]
    for item in items:
        if not isinstance(item, Mapping):
            raise ReftuneError(f"{where} holds a {type(item).__name__}; give objects")
    if not items:
        raise ReftuneError(f"{where} is empty; give an object or leave the field out")
    return items
