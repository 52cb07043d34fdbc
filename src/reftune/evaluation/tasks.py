"""The ReFT paper's language-model tasks: data, prompt, decoding, and how an answer is read and judged.

| group | tasks | judged by |
|---|---|---|
| `commonsense` | boolq, piqa, siqa, hellaswag, winogrande, arc_easy, arc_challenge, openbookqa | the option it names |
| `arithmetic` | aqua, gsm8k, mawps, svamp, addsub, multiarith, singleeq | its last number (aqua: its letter) |
| - | instruct | nothing here: a file of answers for AlpacaEval |
| - | options | the likeliest option of any file of `{prompt, options, answer}` |

Prompts and decoding are those of the paper (arXiv 2404.03592, section 4 and appendix), data that of LLM-Adapters,
which it took over: a local file in that format, or the Hub's dataset, whose rows are written in the same words. To add
a task: one entry of `TASKS`, and for a Hub dataset of new columns one function in `task_rows`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from reftune.data.reading import RawRow, Source, read_rows
from reftune.errors import ReftuneError
from reftune.evaluation import task_rows
from reftune.evaluation.extraction import last_number, letter, option_word
from reftune.evaluation.options import OptionRow, option_row
from reftune.evaluation.task_rows import RowFields, TaskRow, Written
from reftune.inference.generation import GenerationSettings
from reftune.pyreft.datasets import PROMPT_WITHOUT_INPUT

OptionForm = Literal["label", "text"]
TRIGGER = "the correct answer is "

_GREEDY = GenerationSettings(max_new_tokens=32)
_MATH = GenerationSettings(max_new_tokens=512, temperature=0.3, top_p=0.75, top_k=40)
_INSTRUCT = GenerationSettings(max_new_tokens=2048, repetition_penalty=1.1, no_repeat_ngram=5)


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        name: as on the command line.
        group: what it is averaged with, `""` for none.
        hub: Hub dataset (`owner/name:config`); None where there is none with these rows.
        split: the Hub dataset's split that results are reported on.
        convert: writes a Hub row as LLM-Adapters' instruction and answer.
        template: the paper's prompt, one `%s` for the instruction.
        decoding: the paper's.
        extract: what an answer's text says; None where nothing is judged.
        words: the options' names, for tasks whose answer is one of them.
        text_template: the prompt where the options' texts are scored instead of their names, as in
            lm-evaluation-harness (but for winogrande, whose option is scored with the rest of the sentence).
        files: names under which a folder of data may hold it.
    """

    name: str
    group: str
    hub: str | None
    split: str
    convert: Callable[[RowFields], Written]
    template: str
    decoding: GenerationSettings
    extract: Callable[[str], str | float | None] | None
    words: tuple[str, ...] = ()
    text_template: str = "Question: %s\nAnswer:"
    files: tuple[str, ...] = field(default=())

    def rows(self, source: Source | None = None, limit: int | None = None) -> list[TaskRow]:
        """The task's rows.

        Args:
            source: a file in LLM-Adapters' format or with the Hub dataset's columns, a folder that holds one under a
                usual name, rows in memory, or None for the Hub dataset.
            limit: only the first rows.

        Raises:
            ReftuneError: naming file, row and field; or there is no data.
        """
        if isinstance(source, (str, Path)) and Path(source).expanduser().is_dir():
            source = find_file(self, Path(source).expanduser()) or source
        if source is None and self.hub is None:
            raise ReftuneError(f"{self.name} has no Hub dataset with its rows: give its file with --data")
        raw = read_rows(self.hub if source is None else source, split=self.split)[:limit]
        return [self.row(one) for one in raw]

    def row(self, raw: RawRow) -> TaskRow:
        """One row, whichever form it has."""
        fields = RowFields(raw)
        instruction = fields.text("instruction") if "instruction" in raw.values else ""
        if instruction:
            more = str(raw.values.get("input") or "").strip()
            instruction = f"{instruction}\n\n{more}" if more else instruction
            answer = fields.value("answer") if self.extract is not None else None
        else:
            instruction, answer = self.convert(fields)
        dataset = str(raw.values.get("dataset") or self.name)
        return TaskRow(instruction, self._gold(answer, raw), raw.where, dataset)

    def _gold(self, answer: Any, raw: RawRow) -> str | float | None:
        if self.extract is None:
            return None
        if isinstance(answer, (list, tuple)) and len(answer) == 1:
            answer = answer[0]
        text = str(answer).strip()
        gold = next((w for w in self.words if w == text.lower()), None) if self.words else self.extract(text)
        if gold is None:
            wanted = (
                f"one of {', '.join(self.words)}"
                if self.words
                else "a letter"
                if self.extract is letter
                else "a number"
            )
            raise ReftuneError(f"{raw.where}: field 'answer' is {answer!r}; give {wanted}")
        return gold

    def option_rows(self, rows: Sequence[TaskRow], form: OptionForm = "label") -> list[OptionRow]:
        """Rows for option scoring, whose prompts are still to be put into a template.

        Args:
            rows: of this task.
            form: `label` keeps the question with its numbered options and scores "the correct answer is answer2", the
                completion that the paper trains; `text` takes the options out of the question and scores their texts.

        Raises:
            ReftuneError: a task without options, or a question whose options cannot be found.
        """
        if not self.words:
            raise ReftuneError(f"{self.name} has no options to score: use --scoring generate")
        return [self._label_row(row) if form == "label" else self._text_row(row) for row in rows]

    def _label_row(self, row: TaskRow) -> OptionRow:
        offered = [word for word in self.words if re.search(rf"\b{word}\b", row.instruction.rpartition("format:")[2])]
        words = offered or list(self.words)
        if row.answer not in words:
            raise ReftuneError(f"{row.where}: the answer is {row.answer!r}, and the question offers {', '.join(words)}")
        options = tuple(TRIGGER + word for word in words)
        return OptionRow(row.instruction, options, words.index(str(row.answer)), row.where)

    def _text_row(self, row: TaskRow) -> OptionRow:
        question, texts = self.parse(row)
        names = self.words[: len(texts)]
        answer = names.index(str(row.answer)) if row.answer in names else None
        if self.name == "winogrande" and "_" in question:
            question, _, rest = question.partition("_")
            texts = [f"{text} {rest.strip()}" for text in texts]
        if self.name == "boolq":
            texts = ["yes", "no"]
        return OptionRow(question.strip(), tuple(texts), answer, row.where)

    def parse(self, row: TaskRow) -> tuple[str, list[str]]:
        """The bare question and the options' texts of an instruction with numbered options (`Answer1: ...`).

        Raises:
            ReftuneError: the options are not numbered from 1 on, or one is empty.
        """
        body = re.split(r"\s*Answer format:", row.instruction)[0]
        leads = (task_rows.QUESTION, task_rows.SOLUTION, task_rows.SENTENCE, task_rows.BLANK, task_rows.TRUTH)
        for lead in leads:
            body = body.removeprefix(f"{lead}: ")
        stem = self.words[0].rstrip("1").capitalize()
        if stem == "True":
            return body.strip(), list(self.words)
        question, *parts = re.split(rf"\s*\b{stem}(\d+):\s*", body)
        numbers, texts = parts[::2], [text.strip() for text in parts[1::2]]
        if len(texts) < 2 or numbers != [str(n) for n in range(1, len(texts) + 1)] or not all(texts):
            raise ReftuneError(
                f"{row.where}: no options '{stem}1: ... {stem}2: ...' were found in the instruction; found: "
                f"{', '.join(stem + number for number in numbers) or 'none'}"
            )
        return question.strip(), texts


def _commonsense(
    name: str, hub: str, split: str, convert: Callable[[RowFields], Written], words: str, text: str = "", *files: str
) -> Task:
    found = tuple(words.split())
    more = {"text_template": text} if text else {}
    return Task(
        name, "commonsense", hub, split, convert, "%s\n", _GREEDY, lambda answer: option_word(answer, found), found,
        files=files, **more,
    )  # fmt: skip


def _arithmetic(
    name: str, hub: str | None, convert: Callable[[RowFields], Written], *files: str, extract: Any = last_number
) -> Task:
    return Task(name, "arithmetic", hub, "test", convert, PROMPT_WITHOUT_INPUT, _MATH, extract, files=files)


_ANSWERS = "answer1 answer2 answer3 answer4 answer5"
_LIST = [
    _commonsense("boolq", "google/boolq", "validation", task_rows.boolq, "true false"),
    _commonsense("piqa", "baber/piqa", "validation", task_rows.piqa, "solution1 solution2"),
    _commonsense(
        "siqa", "allenai/social_i_qa", "validation", task_rows.siqa, "answer1 answer2 answer3", "", "social_i_qa"
    ),
    _commonsense(
        "hellaswag", "Rowan/hellaswag", "validation", task_rows.hellaswag, "ending1 ending2 ending3 ending4", "%s"
    ),
    _commonsense(
        "winogrande", "allenai/winogrande:winogrande_xl", "validation", task_rows.winogrande, "option1 option2", "%s"
    ),
    _commonsense("arc_easy", "allenai/ai2_arc:ARC-Easy", "test", task_rows.arc, _ANSWERS, "", "ARC-Easy"),
    _commonsense(
        "arc_challenge", "allenai/ai2_arc:ARC-Challenge", "test", task_rows.arc, _ANSWERS, "", "ARC-Challenge"
    ),
    _commonsense("openbookqa", "allenai/openbookqa:main", "test", task_rows.openbookqa, _ANSWERS),
    _arithmetic("aqua", "deepmind/aqua_rat:raw", task_rows.aqua, "AQuA", extract=letter),
    _arithmetic("gsm8k", "openai/gsm8k:main", task_rows.question_and("answer")),
    _arithmetic("mawps", "MU-NLPC/Calc-mawps", task_rows.question_and("result")),
    _arithmetic("svamp", "ChilleD/SVAMP", task_rows.svamp, "SVAMP"),
    _arithmetic("addsub", None, task_rows.equations, "AddSub"),
    _arithmetic("multiarith", "ChilleD/MultiArith", task_rows.question_and("final_ans"), "MultiArith"),
    _arithmetic("singleeq", None, task_rows.equations, "SingleEq"),
    Task(
        "instruct", "", "tatsu-lab/alpaca_eval:alpaca_eval", "eval", task_rows.instructions, PROMPT_WITHOUT_INPUT,
        _INSTRUCT, None, files=("alpaca_eval",),
    ),
]  # fmt: skip
TASKS: dict[str, Task] = {task.name: task for task in _LIST}
GROUPS: dict[str, tuple[str, ...]] = {
    group: tuple(task.name for task in _LIST if task.group == group) for group in ("commonsense", "arithmetic")
}
OPTIONS = "options"
"""The name that takes any file of `{prompt, options, answer}`."""


def expand_names(text: str | Sequence[str]) -> list[str]:
    """Task names of a list such as `arc_easy,arithmetic`, groups replaced by their members, each once.

    Raises:
        ReftuneError: a name that is none.
    """
    given = text.split(",") if isinstance(text, str) else text
    names: list[str] = []
    for name in (part.strip() for part in given):
        known = [*TASKS, *GROUPS, OPTIONS]
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            meant = f"; did you mean {close[0]!r}?" if close else ""
            raise ReftuneError(f"task {name!r} is not known{meant}; there are: {', '.join(known)}")
        names += GROUPS.get(name, (name,))
    return list(dict.fromkeys(names))


def find_file(task: Task, folder: Path) -> Path | None:
    """The task's test file in a folder: `arc_easy.json`, `arc_easy_test.json`, `ARC-Easy/test.json`, ..."""
    for name in (task.name, *task.files):
        for pattern in (
            f"{name}.json",
            f"{name}_test.json",
            f"{name}/test.json",
            f"{name}.jsonl",
            f"{name}/test.jsonl",
        ):
            if (folder / pattern).is_file():
                return folder / pattern
    return (
        folder / "test.json" if folder.name in (task.name, *task.files) and (folder / "test.json").is_file() else None
    )


def generic_option_rows(source: Source, limit: int | None = None) -> list[OptionRow]:
    """Rows of any `{prompt, options, answer}` file, each with an answer.

    Raises:
        ReftuneError: naming file, row and field.
    """
    rows = [option_row(raw) for raw in read_rows(source, split="test")[:limit]]
    for row in rows:
        if row.answer is None:
            raise ReftuneError(f"{row.where}: field 'answer' is missing, so nothing can be judged")
    return rows
