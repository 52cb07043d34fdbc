"""Two sets of rows that differ in what is to be steered: from pairs, from two instructions, from labelled texts.

| what is given | positive | negative |
|---|---|---|
| `positive` and `negative`, optional `prompt`, `system` | the one | the other, to the same prompt |
| prompts and two instructions | what the model writes under the one | under the other |
| labelled texts (`text`, `label`) | texts of one class | texts of the other |
| prompts with completions | these | plain answers to other prompts |

Every row is read by the reader of `data`.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from reftune.data.formats import Example, LabelledText, examples_of, labelled_of, pairs_of, read_prompts
from reftune.data.persona import load_demo, neutral_rows
from reftune.data.reading import RawRow, Source, read_rows
from reftune.errors import ReftuneError

Row = Example | LabelledText
Writer = Callable[[Sequence[Example], str], list[str]]
"""Writes answers to prompts under an instruction."""

DEMO_DATA = "demo"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Contrasts:
    """The two sides.

    Attributes:
        positive: rows that show what is wanted.
        negative: rows that show its opposite, or nothing of it.
        paired: whether the rows of the two sides belong together, one by one.
        said: what the sides are, for people.
    """

    positive: list[Row]
    negative: list[Row]
    paired: bool
    said: str

    @property
    def answers(self) -> bool:
        """Whether the rows are prompts with answers, whose likelihood can be measured; else they are whole texts."""
        return isinstance(self.positive[0], Example)


def split(count: int, share: float, seed: int, held: int = 1) -> list[list[int]]:
    """The rows of a side to learn from, and ``held`` parts that are held out, ``share`` of the rows each.

    The same rows of two sides that have as many.
    """
    order = list(range(count))
    random.Random(seed).shuffle(order)
    size = min(max(2, round(count * share)), (count - 2) // held)
    parts = [order[start : start + size] for start in range(0, held * size, size)]
    return [sorted(part) for part in (order[held * size :], *parts)]


def read_contrasts(
    source: Source,
    *,
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
    positive_label: str | None = None,
    instructions: tuple[str, str] | None = None,
    write: Writer | None = None,
) -> Contrasts:
    """Read what is to be told apart.

    Args:
        source: as for `data.reading.read_rows`.
        columns: from a field of the table above to the column that holds it.
        limit: read only the first rows.
        positive_label: of labelled texts, the class that is wanted; None: `1`, `true`, `positive` or `yes`.
        instructions: a positive and a negative instruction, under which ``write`` answers every prompt.
        write: writes these answers.

    Raises:
        ReftuneError: nothing that can be told apart; the message names file, row and field.
    """
    if isinstance(source, str) and source == DEMO_DATA and not Path(DEMO_DATA).exists():
        source = [{"prompt": row.messages[-1].content, "completion": row.completion} for row in load_demo()]
    rows = read_rows(source)[:limit]
    columns = dict(columns or {})
    has = {field for field in rows[0].values} | set(columns)
    if instructions is not None:
        return _instructed(rows, columns, instructions, write)
    if {"positive", "negative"} <= has:
        return _pairs(rows, columns)
    if {"text", "label"} <= has and "completion" not in has:
        return _classes(labelled_of(rows, columns=columns), positive_label)
    if has & {"positive", "negative"}:
        raise ReftuneError(f"{rows[0].source}: a pair needs both columns, positive and negative.")
    examples: list[Row] = list(examples_of(rows, columns=columns))
    return Contrasts(examples, list(neutral_rows()), False, "the completions, against plain answers to other prompts")


def _pairs(rows: Sequence[RawRow], columns: dict[str, str]) -> Contrasts:
    if columns.get("prompt", "prompt") in rows[0].values:
        pairs = pairs_of(rows, columns=columns)
        return Contrasts([*pairs], [replace(pair, completion=pair.rejected or "") for pair in pairs], True, "pairs")
    sides: list[list[Row]] = [
        [LabelledText(_filled(row, columns.get(side, side)), 0, where=row.where) for row in rows]
        for side in ("positive", "negative")
    ]
    for one, other in zip(*sides, strict=True):
        if _text(one).strip() == _text(other).strip():
            raise ReftuneError(f"{one.where}: positive and negative are the same text; a pair has to differ.")
    return Contrasts(sides[0], sides[1], True, "pairs")


def _filled(row: RawRow, column: str) -> str:
    text = row.values.get(column)
    if not isinstance(text, str) or not text.strip():
        raise ReftuneError(f"{row.where}: {column!r} is empty or no text; give both texts of the pair.")
    return text


def _instructed(
    rows: Sequence[RawRow], columns: dict[str, str], instructions: tuple[str, str], write: Writer | None
) -> Contrasts:
    if write is None or any(not text.strip() for text in instructions):
        raise ReftuneError("Two instructions are needed, a positive and a negative one, and neither may be empty.")
    prompts = read_prompts(rows, columns=columns)
    sides: list[list[Row]] = []
    for instruction in instructions:
        answers = write(prompts, instruction)
        sides.append([replace(p, completion=a) for p, a in zip(prompts, answers, strict=True)])
    kept = [
        index for index, (one, other) in enumerate(zip(*sides, strict=True))
        if _text(one).strip() and _text(other).strip() and _text(one).strip() != _text(other).strip()
    ]  # fmt: skip
    if not kept:
        raise ReftuneError(
            "The model answers every prompt alike under both instructions: write instructions that differ more, or "
            "give pairs."
        )
    if len(kept) < len(prompts):
        logger.warning(
            "%s of %s prompts are left out: answered alike, or not at all", len(prompts) - len(kept), len(prompts)
        )
    positive, negative = ([side[index] for index in kept] for side in sides)
    return Contrasts(positive, negative, True, "answers under two instructions")


def wanted_class(labels: Sequence[str], wanted: str | None, source: str, flag: str) -> str:
    """The label that is wanted, of at least two: as asked, else that of the usual ones which is there.

    Raises:
        ReftuneError: one class, one that is not there, or none that is usual.
    """
    known = sorted(set(labels))
    if len(known) < 2:
        raise ReftuneError(f"{source}: every text has the label {known[0]!r}; two classes are needed.")
    if wanted is None:
        usual = [label for label in known if label.lower() in ("1", "true", "positive", "yes")]
        if len(usual) != 1:
            raise ReftuneError(f"{source}: which class is wanted? Name one of {', '.join(known)} ({flag}).")
        wanted = usual[0]
    if wanted not in known:
        raise ReftuneError(f"{flag} {wanted}: no such label in {source}; the labels are {', '.join(known)}.")
    return wanted


def _classes(texts: Sequence[LabelledText], wanted: str | None) -> Contrasts:
    source = texts[0].where.rpartition(", row")[0]
    wanted = wanted_class([str(text.label) for text in texts], wanted, source, "--positive-label")
    positive: list[Row] = [text for text in texts if str(text.label) == wanted]
    negative: list[Row] = [text for text in texts if str(text.label) != wanted]
    return Contrasts(positive, negative, False, f"texts labelled {wanted}, against the others")


def _text(row: Row) -> str:
    return row.completion if isinstance(row, Example) else row.text
