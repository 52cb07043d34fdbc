"""The dataset shapes that are recognised, and their one common form: a context and the completion to learn.

| shape | fields |
|---|---|
| prompt and completion | `prompt`, `completion`, optional `system` (the first two may be lists of messages) |
| Alpaca | `instruction`, `output`, optional `input`, `system` |
| messages | `messages`: list of {"role", "content"}, optional `system` |
| ShareGPT | `conversations`: list of {"from", "value"}, optional `system` |
| labelled text | `text`, `label`, optional `text_pair` |

To add a shape: one `Shape` in `SHAPES` and one function from a row to its examples.
"""

import difflib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from reftune.data.reading import RawRow, Source, read_rows
from reftune.errors import ReftuneError

ROLES = ("system", "user", "assistant", "tool")
_ROLE_NAMES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool", "function_response": "tool",
}  # fmt: skip


@dataclass(frozen=True)
class Message:
    """One turn: `role` is one of `ROLES`."""

    role: str
    content: str


@dataclass(frozen=True)
class Example:
    """The context (system, history and the user's turn) and the assistant's turn to learn; `where` is for messages."""

    messages: tuple[Message, ...]
    completion: str
    where: str = ""


@dataclass(frozen=True)
class LabelledText:
    """A text, or a pair of texts, and its class: an int, a float (regression) or a class name."""

    text: str
    label: int | float | str
    text_pair: str | None = None
    where: str = ""


def read_examples(
    source: Source, *, columns: Mapping[str, str] | None = None, split: str = "train", limit: int | None = None
) -> list[Example]:
    """Read `source` as prompts with completions: one example a row, or one for every assistant turn of a conversation.

    Labelled text becomes the prompt `text` with the label, written out, as the completion.

    Args:
        source: as for `reading.read_rows`.
        columns: from a field of the table above to the column that holds it, e.g. `{"prompt": "question"}`.
        split: split of a Hub dataset or `DatasetDict`.
        limit: read only the first rows.

    Raises:
        ReftuneError: naming file, row and field.
    """
    rows = read_rows(source, split=split)[:limit]
    shape, columns = _recognise(rows, columns or {}, SHAPES)
    return [example for row in rows for example in shape.examples(_Fields(row, columns))]


def read_labelled(
    source: Source, *, columns: Mapping[str, str] | None = None, split: str = "train", limit: int | None = None
) -> list[LabelledText]:
    """Read `source` as labelled text, for classification; arguments and errors as for `read_examples`."""
    rows = read_rows(source, split=split)[:limit]
    _, columns = _recognise(rows, columns or {}, [_LABELLED])
    return [_labelled(_Fields(row, columns)) for row in rows]


@dataclass(frozen=True)
class _Fields:
    """The values of one row by field name, whatever its columns are called."""

    row: RawRow
    columns: Mapping[str, str]

    def name(self, field: str) -> str:
        column = self.columns.get(field, field)
        return repr(field) if column == field else f"{field!r} (column {column!r})"

    def value(self, field: str) -> Any:
        column = self.columns.get(field, field)
        if column not in self.row.values:
            present = ", ".join(map(str, self.row.values))
            raise ReftuneError(f"{self.row.where}: field {self.name(field)} is missing; this row has: {present}")
        return self.row.values[column]

    def text(self, field: str) -> str:
        text = self.optional_text(field)
        if not text.strip():
            raise ReftuneError(f"{self.row.where}: {self.name(field)} is empty; write a text or delete the row")
        return text

    def optional_text(self, field: str) -> str:
        if self.columns.get(field, field) not in self.row.values:
            return "" if field in _OPTIONAL else self.value(field)
        return _as_text(self.value(field), f"{self.row.where}: {self.name(field)}")

    def messages(self, field: str) -> list[Message]:
        value = self.value(field)
        if not isinstance(value, list) or not value:
            kind = "an empty list" if value == [] else f"a {type(value).__name__}"
            raise ReftuneError(f"{self.row.where}: {self.name(field)} is {kind}; give a list of messages")
        return [_message(item, f"{self.row.where}: {self.name(field)}[{i}]") for i, item in enumerate(value)]

    def system(self) -> list[Message]:
        text = self.optional_text("system")
        return [Message("system", text)] if text.strip() else []


@dataclass(frozen=True)
class Shape:
    """A recognised set of fields and the function that reads a row of it."""

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...]
    examples: Callable[[_Fields], Iterator[Example]]


def _prompt_completion(fields: _Fields) -> Iterator[Example]:
    where = fields.row.where
    if isinstance(fields.value("prompt"), list):
        context = [*fields.system(), *fields.messages("prompt")]
    else:
        context = [*fields.system(), Message("user", fields.text("prompt"))]
    if isinstance(fields.value("completion"), list):
        learned = fields.messages("completion")
        if len(learned) != 1 or learned[0].role != "assistant" or not learned[0].content.strip():
            raise ReftuneError(f"{where}: {fields.name('completion')}: give one assistant message with content")
        yield Example(tuple(context), learned[0].content, where)
    else:
        yield Example(tuple(context), fields.text("completion"), where)


def _alpaca(fields: _Fields) -> Iterator[Example]:
    instruction, more = fields.text("instruction"), fields.optional_text("input")
    prompt = f"{instruction}\n\n{more}" if more.strip() else instruction
    yield Example((*fields.system(), Message("user", prompt)), fields.text("output"), fields.row.where)


def _messages(fields: _Fields) -> Iterator[Example]:
    yield from _turns(fields, "messages")


def _conversations(fields: _Fields) -> Iterator[Example]:
    yield from _turns(fields, "conversations")


def _turns(fields: _Fields, field: str) -> Iterator[Example]:
    """One example for every assistant turn that has a user turn somewhere before it."""
    where, turns = fields.row.where, fields.messages(field)
    system = [] if turns[0].role == "system" else fields.system()
    found = False
    for index, turn in enumerate(turns):
        if turn.role != "assistant":
            continue
        if not turn.content.strip():
            raise ReftuneError(
                f"{where}: {fields.name(field)}[{index}]: the assistant's turn (the completion) is empty"
            )
        if any(earlier.role == "user" for earlier in turns[:index]):
            found = True
            yield Example((*system, *turns[:index]), turn.content, where)
    if not found:
        raise ReftuneError(
            f"{where}: {fields.name(field)} has no assistant turn after a user turn, so nothing to learn"
        )


def _text_label(fields: _Fields) -> Iterator[Example]:
    row = _labelled(fields)
    prompt = row.text if row.text_pair is None else f"{row.text}\n\n{row.text_pair}"
    yield Example((Message("user", prompt),), str(row.label), row.where)


def _labelled(fields: _Fields) -> LabelledText:
    label = fields.value("label")
    if isinstance(label, bool):
        label = int(label)
    if isinstance(label, str):
        label = fields.text("label").strip()
    elif not isinstance(label, (int, float)):
        kind = "null" if label is None else f"a {type(label).__name__}"
        raise ReftuneError(f"{fields.row.where}: {fields.name('label')} is {kind}; give a class name or a number")
    return LabelledText(fields.text("text"), label, fields.optional_text("text_pair") or None, fields.row.where)


_LABELLED = Shape("labelled text", ("text", "label"), ("text_pair",), _text_label)
SHAPES = [  # in the order of preference where a file fits several
    Shape("prompt and completion", ("prompt", "completion"), ("system",), _prompt_completion),
    Shape("messages", ("messages",), ("system",), _messages),
    Shape("ShareGPT", ("conversations",), ("system",), _conversations),
    Shape("Alpaca", ("instruction", "output"), ("input", "system"), _alpaca),
    _LABELLED,
]
_OPTIONAL = {field for shape in SHAPES for field in shape.optional}


def _recognise(rows: list[RawRow], columns: Mapping[str, str], shapes: list[Shape]) -> tuple[Shape, Mapping[str, str]]:
    """Return the first shape whose required fields the first row has, and which uses every mapped field."""
    source = rows[0].source if rows else "the file"
    known = sorted({field for shape in shapes for field in (*shape.required, *shape.optional)})
    for field, column in columns.items():
        if field not in known:
            raise ReftuneError(f"columns: {field!r} is not a field; map one of {', '.join(known)}")
        if not any(column in row.values for row in rows):
            present = [str(name) for name in rows[0].values]
            close = difflib.get_close_matches(column, present, n=1)
            meant = f"; did you mean {close[0]!r}?" if close else ""
            raise ReftuneError(
                f"{source}: unknown column {column!r} for the field {field!r}; the columns are: "
                f"{', '.join(present)}{meant}"
            )
    present = set(map(str, rows[0].values)) - set(columns.values()) | set(columns)
    for shape in shapes:
        if present.issuperset(shape.required) and set(columns) <= {*shape.required, *shape.optional}:
            return shape, columns
    wanted = "; ".join(" + ".join(shape.required) for shape in shapes)
    raise ReftuneError(
        f"{source}: the columns ({', '.join(map(str, rows[0].values))}) are none of: {wanted}. "
        "Rename them, or map them, e.g. columns={'prompt': 'question', 'completion': 'answer'}"
    )


def _as_text(value: Any, where: str) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    raise ReftuneError(f"{where} is a {type(value).__name__}; give text")


def _message(item: Any, where: str) -> Message:
    if not isinstance(item, Mapping):
        raise ReftuneError(f"{where} is a {type(item).__name__}; give an object with 'role' and 'content'")
    role_key, content_key = ("from", "value") if "from" in item else ("role", "content")
    for key in (role_key, content_key):
        if key not in item:
            raise ReftuneError(f"{where} has no {key!r}; it has: {', '.join(map(str, item))}")
    role = _ROLE_NAMES.get(str(item[role_key]).lower())
    if role is None:
        raise ReftuneError(f"{where}: {role_key}={item[role_key]!r} is not a role; use one of {', '.join(ROLES)}")
    content = item[content_key]
    if isinstance(content, list):  # OpenAI's content parts
        for part in content:
            if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
                raise ReftuneError(f"{where}.{content_key} has a part that is not text; only text is trained on")
        content = "".join(part["text"] for part in content)
    return Message(role, _as_text(content, f"{where}.{content_key}"))
