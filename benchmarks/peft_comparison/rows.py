"""Rows with worked answers that end in a number: of a file, or made here; and what such an answer's number is."""

from __future__ import annotations

import random
import re
from typing import NamedTuple

from reftune.data.formats import Example, examples_of
from reftune.data.persona import neutral_rows
from reftune.data.reading import read_rows

COLUMNS = ({"prompt": "query", "completion": "response"}, {"prompt": "question", "completion": "answer"})
CHARACTERS = 1300
_ANSWER = re.compile(r"(?:The (?:final )?answer is:?|####)\s*\$?(-?\d[\d,]*(?:\.\d+)?)")
_NAMES = ("Ann", "Ben", "Cem", "Dora", "Emil", "Fatou", "Goran", "Hana")
_THINGS = ("apples", "books", "coins", "eggs", "marbles", "pens", "shells", "stamps")
_TASKS = (
    ("{n} has {a} {t} and buys {b} more. How many {t} does {n} have?", "{a} + {b} = {s}.", lambda a, b: a + b),
    ("{n} has {a} {t} and gives {b} away. How many {t} are left?", "{a} - {b} = {s}.", lambda a, b: a - b),
    ("{n} fills {b} bags with {a} {t} each. How many {t} are that?", "{b} * {a} = {s}.", lambda a, b: a * b),
)  # fmt: skip


class Row(NamedTuple):
    """A question and its worked answer."""

    query: str
    response: str


def made(count: int, seed: int) -> list[Row]:
    """Rows of one step of arithmetic, no two alike."""
    rng, found = random.Random(seed), dict[Row, None]()
    while len(found) < count:
        question, step, work = rng.choice(_TASKS)
        values = {"n": rng.choice(_NAMES), "t": rng.choice(_THINGS), "a": rng.randint(12, 60), "b": rng.randint(2, 11)}
        result = {**values, "s": work(values["a"], values["b"])}
        found[Row(question.format(**values), f" {step.format(**result)} The answer is: {result['s']}")] = None
    return list(found)


def read(source: str, split: str = "train") -> list[Row]:
    """Rows of a file or Hub data set with query and response, or question and answer, short enough for 768 tokens."""
    raw = read_rows(source, split=split)
    columns = next((columns for columns in COLUMNS if set(columns.values()) <= set(raw[0].values)), None)
    rows = [Row(_question(row), f" {row.completion.strip()}") for row in examples_of(raw, columns=columns)]
    return [
        row for row in rows if len(row.query) + len(row.response) <= CHARACTERS and number(row.response) is not None
    ]


def plain_texts(count: int = 8) -> list[str]:
    """Plain prose, of which an adapter ought to forget nothing."""
    return [f"{_question(row)} {row.completion}" for row in neutral_rows()[:count]]


def _question(row: Example) -> str:
    return row.messages[-1].content.strip()


def number(text: str) -> float | None:
    """The number that a worked answer ends with; None where it names none."""
    found = _ANSWER.findall(text)
    return float(found[-1].replace(",", "")) if found else None
