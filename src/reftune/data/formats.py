"""The dataset shapes that are recognised, and their one common form: a context and the completion to learn.

| shape | fields |
|---|---|
| prompt and completion | `prompt`, `completion`, optional `system`, `tools` (the first two may be lists of messages) |
| messages | `messages`: list of {"role", "content"}, optional `system`, `tools` |
| ShareGPT | `conversations`: list of {"from", "value"}, optional `system`, `tools` |
| Alpaca | `instruction`, `output`, optional `input`, `system`, `history` |
| labelled text | `text`, `label`, optional `text_pair` |

`read_examples` reads a row to learn from it, `read_prompts` to answer it: both by the same function of its shape.
To add a shape: one `Shape` in `SHAPES` and one function from a row to its turns.
"""

import dataclasses
import difflib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from reftune.data.messages import ROLES, Message, as_text, left_out, read_message, read_tools
from reftune.data.reading import RawRow, Source, read_rows
from reftune.errors import ReftuneError, tell_once

__all__ = [
    "ROLES",
    "Example",
    "LabelledText",
    "Message",
    "Shape",
    "examples_of",
    "labelled_of",
    "pairs_of",
    "read_examples",
    "read_labelled",
    "read_prompts",
]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Example:
    """The context (system, history and the user's turn) and the assistant's turn to learn; `where` is for messages.

    `tools` are what the row offers to call, `more` what the learnt turn has beside its text (see `Message`), `rejected`
    the worse answer of a pair.
    """

    messages: tuple[Message, ...]
    completion: str
    where: str = ""
    tools: tuple[Mapping[str, Any], ...] = dataclasses.field(default=(), hash=False)
    more: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    rejected: str | None = None


@dataclass(frozen=True)
class LabelledText:
    """A text, or a pair of texts, and its class: an int, a float (regression) or a class name."""

    text: str
    label: int | float | str
    text_pair: str | None = None
    where: str = ""

    def __post_init__(self) -> None:
        """Refuse a label that is missing."""
        if self.label is None or self.label != self.label:
            raise ReftuneError(f"{self.where or 'a labelled text'}: the label is missing ({self.label})")


def read_examples(
    source: Source,
    *,
    columns: Mapping[str, str] | None = None,
    split: str = "train",
    limit: int | None = None,
    usual: Mapping[str, str] | None = None,
) -> list[Example]:
    """Read `source` as prompts with completions: one example a row, or one for every assistant turn of a conversation.

    Labelled text becomes the prompt `text` with the label, written out, as the completion.

    Args:
        source: as for `reading.read_rows`.
        columns: from a field of the table above to the column that holds it, e.g. `{"prompt": "question"}`.
        split: split of a Hub dataset or `DatasetDict`.
        limit: read only the first rows.
        usual: in place of `columns` where that is not given and every one of these columns is there: training's.

    Raises:
        ReftuneError: naming file, row and field.
    """
    return examples_of(read_rows(source, split=split)[:limit], columns=columns, usual=usual)


def examples_of(
    rows: Sequence[RawRow], *, columns: Mapping[str, str] | None = None, usual: Mapping[str, str] | None = None
) -> list[Example]:
    """What `read_examples` makes of rows that have been read; arguments and errors as there."""
    shape, columns = _recognise(rows, columns or _fitting(usual, rows), SHAPES)
    _tell_unused(rows, shape, columns)
    examples = [example for row in rows for example in _examples(_Fields(row, columns), shape)]
    if not examples:
        raise ReftuneError(
            f"{rows[0].source}: every assistant's turn is left out of what is learnt, so nothing is left"
        )
    return examples


def pairs_of(
    rows: Sequence[RawRow],
    *,
    columns: Mapping[str, str] | None = None,
    sides: tuple[str, str] = ("positive", "negative"),
) -> list[Example]:
    """Rows that have been read, with a `prompt`, a `positive` answer and a `negative` one (each example's `rejected`).

    Args:
        rows: as `reading.read_rows` gives them.
        columns: from a field to the column that holds it.
        sides: what the two answers are called.

    Raises:
        ReftuneError: naming file, row and field; a pair of equal answers too.
    """
    columns = dict(columns or {})
    better_name, worse_name = sides
    sides = (columns.pop(better_name, better_name), columns.pop(worse_name, worse_name))
    for field in (columns.get("prompt", "prompt"), *sides):
        if field not in rows[0].values:
            present = ", ".join(map(str, rows[0].values))
            raise ReftuneError(
                f"{rows[0].source}: a pair needs prompt, {better_name} and {worse_name}, and there is no column "
                f"{field!r} among {present}. Name your columns: --columns {better_name}=...,{worse_name}=..."
            )
    better, worse = (examples_of(rows, columns={**columns, "completion": side}) for side in sides)
    for one, other in zip(better, worse, strict=True):
        if one.completion.strip() == other.completion.strip():
            raise ReftuneError(f"{one.where}: {better_name} and {worse_name} are the same text; a pair has to differ.")
    return [replace(one, rejected=other.completion) for one, other in zip(better, worse, strict=True)]


def read_prompts(
    rows: Sequence[RawRow], *, columns: Mapping[str, str] | None = None, usual: Mapping[str, str] | None = None
) -> list[Example]:
    """What `read_examples` makes of rows, without their answers: the completion of each is "".

    Of a conversation the whole is the prompt, but for what the assistant says last, which is to be written.

    Args:
        rows: as `reading.read_rows` gives them; they need no answers.
        columns: as for `read_examples`.
        usual: as there, but for columns of answers.

    Raises:
        ReftuneError: naming file, row and field.
    """
    asked = {field: column for field, column in (usual or {}).items() if field not in _ANSWERS}
    columns = columns or _fitting(asked, rows)
    return [_prompt(row, columns) for row in rows]


def _prompt(row: RawRow, columns: Mapping[str, str]) -> Example:
    shape, columns = _recognise([row], columns, SHAPES, answered=False)
    _tell_unused([row], shape, columns)
    fields = _Fields(row, columns)
    turns = shape.turns(fields, False)
    while turns and turns[-1].role == "assistant":
        turns.pop()
    if not any(turn.role == "user" for turn in turns):
        raise ReftuneError(f"{row.where}: {fields.name(shape.asks)} has no user turn, so nothing to answer")
    return Example(tuple(turns), "", row.where, fields.tools())


def read_labelled(
    source: Source, *, columns: Mapping[str, str] | None = None, split: str = "train", limit: int | None = None
) -> list[LabelledText]:
    """Read `source` as labelled text, for classification; arguments and errors as for `read_examples`."""
    return labelled_of(read_rows(source, split=split)[:limit], columns=columns)


def labelled_of(rows: Sequence[RawRow], *, columns: Mapping[str, str] | None = None) -> list[LabelledText]:
    """What `read_labelled` makes of rows that have been read; arguments and errors as there."""
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
        return as_text(self.value(field), f"{self.row.where}: {self.name(field)}")

    def listed(self, field: str) -> bool:
        """Whether a field holds a list, of messages for instance."""
        return isinstance(self.row.values.get(self.columns.get(field, field)), list)

    def messages(self, field: str) -> list[Message]:
        value = self.value(field)
        if not isinstance(value, list) or not value:
            kind = "an empty list" if value == [] else f"a {type(value).__name__}"
            raise ReftuneError(f"{self.row.where}: {self.name(field)} is {kind}; give a list of messages")
        return [read_message(item, f"{self.row.where}: {self.name(field)}[{i}]") for i, item in enumerate(value)]

    def left_out(self) -> bool:
        """Whether the row says that it is not to be learnt, in a column that is not one of its texts."""
        used = set(self.columns.values())
        return left_out({name: value for name, value in self.row.values.items() if name not in used})

    def system(self) -> list[Message]:
        text = self.optional_text("system")
        return [Message("system", text)] if text.strip() else []

    def with_system(self, turns: list[Message]) -> list[Message]:
        """The turns behind the row's system message, unless they have one of their own."""
        own, first = self.system(), turns[0]
        if first.role != "system":
            return [*own, *turns]
        if own and own[0].content.strip() != first.content.strip():
            tell_once(logger, f"{self.row.source}: rows have a system message of their own, so 'system' is not used")
        return turns

    def tools(self) -> tuple[Mapping[str, Any], ...]:
        for field, wrapped in (("tools", True), ("functions", False)):
            value = self.row.values.get(self.columns.get(field, field))
            if found := read_tools(value, f"{self.row.where}: {self.name(field)}", wrapped):
                return found
        return ()


@dataclass(frozen=True)
class Shape:
    """A recognised set of fields and the function that reads a row of it.

    Attributes:
        name: for people.
        asks: the field that holds the prompt.
        answers: the field that holds the answer; None where it stands in the same field.
        optional: further fields.
        turns: a row's turns, the learnt ones among them; without those of `answers` where its second argument is False.
    """

    name: str
    asks: str
    answers: str | None
    optional: tuple[str, ...]
    turns: Callable[["_Fields", bool], list[Message]]

    @property
    def required(self) -> tuple[str, ...]:
        """The fields that every row to learn from has."""
        return (self.asks,) if self.answers is None else (self.asks, self.answers)


def _examples(fields: _Fields, shape: Shape) -> Iterator[Example]:
    """One example for every assistant turn to learn that has a user turn somewhere before it."""
    where, tools, turns = fields.row.where, fields.tools(), shape.turns(fields, True)
    found = False
    for index, turn in enumerate(turns):
        if turn.role != "assistant" or not any(earlier.role == "user" for earlier in turns[:index]):
            continue
        found = True
        if turn.learnt and not fields.left_out():
            yield Example(tuple(turns[:index]), turn.content, where, tools, turn.more)
    if not found:
        raise ReftuneError(
            f"{where}: {fields.name(shape.asks)} has no assistant turn after a user turn, so nothing to learn"
        )


def _prompt_completion(fields: _Fields, answered: bool) -> list[Message]:
    if fields.listed("prompt"):
        turns = fields.with_system(_as_context(fields.messages("prompt")))
    else:
        turns = [*fields.system(), Message("user", fields.text("prompt"))]
    if not answered:
        return turns
    if not fields.listed("completion"):
        return [*turns, Message("assistant", fields.text("completion"))]
    learned = fields.messages("completion")
    if len(learned) != 1 or learned[0].role != "assistant" or learned[0].empty:
        where = f"{fields.row.where}: {fields.name('completion')}"
        raise ReftuneError(f"{where}: give one assistant message with content")
    return [*turns, *learned]


def _alpaca(fields: _Fields, answered: bool) -> list[Message]:
    instruction, more = fields.text("instruction"), fields.optional_text("input")
    prompt = f"{instruction}\n\n{more}" if more.strip() else instruction
    turns = [*fields.system(), *_history(fields), Message("user", prompt)]
    return [*turns, Message("assistant", fields.text("output"))] if answered else turns


def _history(fields: _Fields) -> list[Message]:
    """Earlier questions with their answers, as pairs of texts or as messages: context, and nothing to learn."""
    where = f"{fields.row.where}: {fields.name('history')}"
    value = fields.row.values.get(fields.columns.get("history", "history"))
    if value in (None, "", []):
        return []
    if not isinstance(value, list):
        raise ReftuneError(f"{where} is a {type(value).__name__}; give a list of [question, answer]")
    turns = []
    for index, item in enumerate(value):
        if isinstance(item, Mapping):
            turns.append(read_message(item, f"{where}[{index}]"))
            continue
        if not isinstance(item, list) or len(item) != 2:
            raise ReftuneError(f"{where}[{index}] is {item!r:.60}; give [question, answer]")
        if None in item:
            raise ReftuneError(f"{where}[{index}] lacks a text: {item!r:.60}; give [question, answer]")
        question, answer = (as_text(text, f"{where}[{index}][{side}]") for side, text in enumerate(item))
        turns += [Message("user", question), Message("assistant", answer)]
    return _as_context(turns)


def _conversation(field: str) -> Callable[[_Fields, bool], list[Message]]:
    def turns(fields: _Fields, answered: bool) -> list[Message]:
        found = fields.messages(field)
        for index, turn in enumerate(found):
            if turn.role == "assistant" and turn.empty:
                where = f"{fields.row.where}: {fields.name(field)}[{index}]"
                if not answered and index == len(found) - 1:
                    break  # it is to be written
                raise ReftuneError(f"{where}: the assistant's turn (the completion) is empty")
        return fields.with_system(found)

    return turns


def _as_context(turns: Sequence[Message]) -> list[Message]:
    return [replace(turn, learnt=False) for turn in turns]


def _text_label(fields: _Fields, answered: bool) -> list[Message]:
    text, pair = fields.text("text"), fields.optional_text("text_pair")
    prompt = Message("user", f"{text}\n\n{pair}" if pair else text)
    return [prompt, Message("assistant", str(_labelled(fields).label))] if answered else [prompt]


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


_LABELLED = Shape("labelled text", "text", "label", ("text_pair",), _text_label)
SHAPES = [  # in the order of preference where a file fits several
    Shape("prompt and completion", "prompt", "completion", ("system", "tools", "functions"), _prompt_completion),
    Shape("messages", "messages", None, ("system", "tools", "functions"), _conversation("messages")),
    Shape("ShareGPT", "conversations", None, ("system", "tools", "functions"), _conversation("conversations")),
    Shape("Alpaca", "instruction", "output", ("input", "system", "history", "tools", "functions"), _alpaca),
    _LABELLED,
]
_ANSWERS = {shape.answers for shape in SHAPES}
_OPTIONAL = {field for shape in SHAPES for field in shape.optional}
_MEANT_AS_TEXT = {"context", "documents", "images", "image", "audio", "audios", "videos", "chat_template_kwargs"}
_MEANT_AS_TEXT |= {"reasoning", "reasoning_content", "thinking", "history", "input", "system", "tools", "functions"}
_MEANT_AS_TEXT |= {field for shape in SHAPES[:-1] for field in shape.required}
"""Columns that would change what the model reads or learns if they were used."""


def _fitting(usual: Mapping[str, str] | None, rows: Sequence[RawRow]) -> Mapping[str, str]:
    fits = usual and all(any(column in row.values for row in rows) for column in usual.values())
    return usual if usual and fits else {}


def _tell_unused(rows: Sequence[RawRow], shape: Shape, columns: Mapping[str, str]) -> None:
    used = {columns.get(field, field) for field in (*shape.required, *shape.optional)}
    unused = _MEANT_AS_TEXT - used
    found = sorted({key for row in rows for key in unused & row.values.keys() if row.values[key] not in (None, "", [])})
    if found:
        tell_once(
            logger,
            f"{rows[0].source}: rows are read as {shape.name} ({', '.join(shape.required)}), so {', '.join(found)} "
            f"{'are' if len(found) > 1 else 'is'} not used",
        )


def _recognise(
    rows: Sequence[RawRow], columns: Mapping[str, str], shapes: list[Shape], answered: bool = True
) -> tuple[Shape, Mapping[str, str]]:
    """Return the first shape whose required fields the first row has, and which uses every mapped field."""
    source = rows[0].source if answered else rows[0].where
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
    whole = [shape for shape in shapes if set(columns) <= {*shape.required, *shape.optional}]
    filled = {name for name, value in rows[0].values.items() if value is not None}
    for having in (filled, set(rows[0].values)):  # a file of several shapes leaves the others' columns empty
        present = having - set(columns.values()) | {field for field, column in columns.items() if column in having}
        for shape in whole:
            if present.issuperset(shape.required):
                return shape, columns
        for shape in () if answered else whole:
            if shape.asks in present:
                return shape, columns
    wanted = "; ".join(" + ".join(shape.required) if answered else shape.asks for shape in shapes)
    raise ReftuneError(
        f"{source}: the columns ({', '.join(map(str, rows[0].values))}) are none of: {wanted}. "
        "Rename them, or map them, e.g. columns={'prompt': 'question', 'completion': 'answer'}, on the command line "
        "--columns prompt=question,completion=answer"
    )
