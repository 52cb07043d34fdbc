"""Rows of the paper's tasks: LLM-Adapters' files, and the Hub's datasets brought into the same form.

LLM-Adapters' form is `{instruction, answer}`, the instruction being the whole question with its options. A Hub dataset
has its own columns; one function here writes each of them as that instruction. Everything that is wrong with a row is
said with its file, its number and the field.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reftune.data.reading import RawRow
from reftune.errors import ReftuneError


@dataclass(frozen=True)
class TaskRow:
    """A question as the model gets it, and the right answer (None where nothing is judged)."""

    instruction: str
    answer: str | float | None
    where: str = ""
    dataset: str = ""


@dataclass(frozen=True)
class RowFields:
    """One row's values, with errors that name file, row and field."""

    row: RawRow

    def value(self, name: str) -> Any:
        """The field's value, of any kind.

        Raises:
            ReftuneError: there is no such field, or it is null.
        """
        if self.row.values.get(name) is None:
            state = "is null" if name in self.row.values else "is missing"
            has = ", ".join(map(str, self.row.values))
            raise ReftuneError(f"{self.row.where}: field {name!r} {state}; this row has: {has}")
        return self.row.values[name]

    def text(self, name: str) -> str:
        """The field as text that is not empty."""
        value = self.value(name)
        if not isinstance(value, (str, int, float)) or not str(value).strip():
            raise ReftuneError(f"{self.row.where}: field {name!r} is {value!r}; give a text")
        return str(value).strip()

    def texts(self, name: str) -> list[str]:
        """The field as a list of texts."""
        value = self.value(name)
        if isinstance(value, str) or not isinstance(value, Sequence) or not value:
            raise ReftuneError(f"{self.row.where}: field {name!r} is {value!r}; give a list of texts")
        return [str(item).strip() for item in value]

    def number(self, name: str) -> int:
        """The field as a whole number (`"1"` too)."""
        try:
            return int(self.value(name))
        except (TypeError, ValueError) as error:
            raise ReftuneError(f"{self.row.where}: field {name!r} is {self.value(name)!r}; give a number") from error

    def key(self, name: str, keys: Sequence[str]) -> int:
        """The place of the field's value among keys (`"C"` in A, B, C, D)."""
        if self.text(name) not in keys:
            raise ReftuneError(f"{self.row.where}: field {name!r} is {self.text(name)!r}, none of {', '.join(keys)}")
        return list(keys).index(self.text(name))


Written = tuple[str, Any]
"""An instruction and its answer."""


def listed(
    row: RowFields, lead: str, question: str, stem: str, options: Sequence[str], answer: int, between: str = " "
) -> Written:
    """LLM-Adapters' question with numbered options: `Answer1: ... Answer2: ...` and the format of the answer."""
    names = [f"{stem}{number}" for number in range(1, len(options) + 1)]
    body = between.join(f"{name.capitalize()}: {option}" for name, option in zip(names, options, strict=True))
    if not 0 <= answer < len(options):
        raise ReftuneError(f"{row.row.where}: the answer's index {answer} is none of the {len(options)} options")
    return f"{lead}: {question}\n\n{body}\n\nAnswer format: {'/'.join(names)}", names[answer]


QUESTION = "Please choose the correct answer to the question"
SOLUTION = "Please choose the correct solution to the question"
SENTENCE = "Please choose the correct ending to complete the given sentence"
BLANK = "Please choose the correct answer to fill in the blank to complete the given sentence"
TRUTH = "Please answer the following question with true or false, question"


def boolq(row: RowFields) -> Written:
    """google/boolq; the passage is left out, as in LLM-Adapters."""
    return f"{TRUTH}: {row.text('question')}?\n\nAnswer format: true/false", str(bool(row.value("answer"))).lower()


def piqa(row: RowFields) -> Written:
    """PIQA: goal, sol1, sol2, label."""
    options = [row.text("sol1"), row.text("sol2")]
    return listed(row, SOLUTION, row.text("goal"), "solution", options, row.number("label"), "\n\n")


def siqa(row: RowFields) -> Written:
    """Social IQa: context, question, answerA to answerC, label from 1."""
    options = [row.text(f"answer{letter}") for letter in "ABC"]
    return listed(
        row, QUESTION, f"{row.text('context')} {row.text('question')}", "answer", options, row.number("label") - 1
    )


def hellaswag(row: RowFields) -> Written:
    """HellaSwag: activity_label, ctx, endings, label."""
    sentence = f"{row.text('activity_label')}: {row.text('ctx')}"
    return listed(row, SENTENCE, sentence, "ending", row.texts("endings"), row.number("label"), "\n\n")


def winogrande(row: RowFields) -> Written:
    """WinoGrande: sentence, option1, option2, answer from 1."""
    options = [row.text("option1"), row.text("option2")]
    return listed(row, BLANK, row.text("sentence"), "option", options, row.number("answer") - 1)


def arc(row: RowFields) -> Written:
    """ARC: question, choices {text, label}, answerKey."""
    return _with_choices(row, "question")


def openbookqa(row: RowFields) -> Written:
    """OpenBookQA: question_stem, choices {text, label}, answerKey."""
    return _with_choices(row, "question_stem")


def _with_choices(row: RowFields, question: str) -> Written:
    choices = row.value("choices")
    if not isinstance(choices, Mapping) or not {"text", "label"} <= set(choices):
        raise ReftuneError(f"{row.row.where}: field 'choices' is {choices!r}; give an object with 'text' and 'label'")
    answer = row.key("answerKey", [str(label) for label in choices["label"]])
    return listed(row, QUESTION, row.text(question), "answer", [str(text).strip() for text in choices["text"]], answer)


def aqua(row: RowFields) -> Written:
    """AQuA-RAT: question, options ("A)21"), correct."""
    options = [re.sub(r"^\(?([A-E])\)\s*", r"(\1) ", option) for option in row.texts("options")]
    return f"{row.text('question')} Answer Choices: {' '.join(options)}", row.text("correct")


def question_and(answer: str) -> Callable[[RowFields], Written]:
    """A dataset with a `question` and the number in another column (GSM8K's after `####`)."""
    return lambda row: (row.text("question"), row.text(answer).rpartition("####")[2])


def svamp(row: RowFields) -> Written:
    """SVAMP: Body, Question, Answer."""
    body = row.text("Body")
    return f"{body if body.endswith(('.', '?', '!')) else body + '.'} {row.text('Question')}", row.text("Answer")


def equations(row: RowFields) -> Written:
    """The files of AddSub and SingleEq: sQuestion, lSolutions."""
    return row.text("sQuestion"), row.value("lSolutions")


def instructions(row: RowFields) -> Written:
    """AlpacaEval: instruction (nothing is judged)."""
    return row.text("instruction"), None
