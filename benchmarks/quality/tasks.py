"""What is learned: three tasks that a model of 135M parameters can learn from few rows, and their held-out rows."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from reftune.data.persona import load_demo
from reftune.output.files import write_text

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
FOUR = [10, 14, 18, 22]


@dataclass(frozen=True)
class Task:
    """One comparison: its rows, the shared settings, and the methods that are compared.

    Attributes:
        name: of its files and pictures.
        title: of its section.
        methods: by name; `lr` holds the learning rates that are tried on validation rows.
        shared: settings of all methods.
        train_rows, validation_rows, held_out_rows, option_rows: how many of each.
        pyreft: the method that pyreft is trained beside, with equal settings.
    """

    name: str
    title: str
    methods: dict[str, Any]
    shared: dict[str, Any] = field(default_factory=dict)
    train_rows: int = 80
    validation_rows: int = 40
    held_out_rows: int = 60
    option_rows: int = 0
    pyreft: str = ""


def edit(positions: str, layers: Any, rank: int, *lr: float, **more: Any) -> dict[str, Any]:
    return {"method": "loreft", "positions": positions, "layers": layers, "rank": rank, "lr": lr, **more}


def direft(positions: str, layers: Any, rank: int, *lr: float) -> dict[str, Any]:
    return edit(positions, layers, rank, *lr, method="direft")


def lora(rank: int, *lr: float) -> dict[str, Any]:
    return {"method": "lora", "target_modules": ["q_proj", "v_proj"], "rank": rank, "lr": lr}


REFERENCE = "LoRA r8"
PAPER = "LoReFT l1, all layers, r4, paper's start"
PYREFT = f"{PAPER}, Householder"

TASKS = {
    task.name: task
    for task in (
        Task(
            "arc",
            "ARC-Easy, the answer's text after four solved examples: long prompts, short completions",
            {
                "base": "base",
                REFERENCE: lora(8, 1e-3, 2e-3, 4e-3),
                "LoRA r1": lora(1, 3e-3, 6e-3),
                "LoReFT l1, one layer": edit("l1", [14], 4, 8e-3),
                "LoReFT l1, four layers": edit("l1", FOUR, 4, 6e-3),
                "LoReFT l1, all layers, r1": edit("l1", "all", 1, 1e-3, 2e-3),
                "LoReFT l1, all layers, r4": edit("l1", "all", 4, 1e-3, 2e-3),
                PAPER: edit("l1", "all", 4, 2e-3, init="paper"),
                PYREFT: edit("l1", "all", 4, 2e-3, init="paper", parametrization="householder"),
                "DiReFT l1, all layers, r4": direft("l1", "all", 4, 2e-3),
                "LoReFT f7+l7, all layers, r1": edit("f7+l7", "all", 1, 2e-3, 4e-3),
                "LoReFT prompt, all layers, r1": edit("prompt", "all", 1, 2e-3),
                "LoReFT l1+generated, all layers, r1": edit("l1+generated", "all", 1, 1e-3, 2e-3),
                "DiReFT l1+generated, all layers, r1": direft("l1+generated", "all", 1, 1e-3, 2e-3, 4e-3),
                "LoReFT all tokens, all layers, r1": edit("all", "all", 1, 2e-3, 4e-3),
                "DiReFT all tokens, all layers, r1": direft("all", "all", 1, 1e-3, 2e-3),
            },
            {"template": "%s", "batch_size": 8},
            option_rows=60,
            pyreft=PYREFT,
        ),
        Task(
            "arithmetic",
            "Word problems with worked steps: short prompts, long completions",
            {
                "base": "base",
                REFERENCE: lora(8, 3e-3, 6e-3, 12e-3),
                "LoReFT l1, all layers, r4": edit("l1", "all", 4, 2e-3),
                "LoReFT f7+l7, all layers, r1": edit("f7+l7", "all", 1, 4e-3),
                "LoReFT l1+generated, all layers, r1": edit("l1+generated", "all", 1, 4e-3, 8e-3),
                "LoReFT all tokens, all layers, r1": edit("all", "all", 1, 4e-3, 8e-3),
                "DiReFT l1+generated, all layers, r1": direft("l1+generated", "all", 1, 4e-3, 8e-3, 12e-3),
            },
            {"template": "Q: %s", "batch_size": 8},
            train_rows=48,
            validation_rows=24,
            held_out_rows=24,
        ),
        Task(
            "persona",
            "A pirate's manner (the bundled rows): every token of the answer changes",
            {
                "base": "base",
                REFERENCE: lora(8, 3e-3, 6e-3, 12e-3),
                "LoRA r1": lora(1, 6e-3, 12e-3, 24e-3),
                "LoReFT l1, one layer": edit("l1", [14], 4, 8e-3),
                "LoReFT l1, four layers": edit("l1", FOUR, 4, 6e-3, 12e-3),
                "LoReFT all tokens, four layers": edit("all", FOUR, 4, 6e-3, 12e-3),
                "LoReFT l1+generated, all layers, r1": edit("l1+generated", "all", 1, 4e-3, 8e-3),
                "DiReFT l1+generated, all layers, r1": direft("l1+generated", "all", 1, 4e-3, 8e-3),
                "LoReFT all tokens, all layers, r1": edit("all", "all", 1, 4e-3, 8e-3),
                "DiReFT all tokens, all layers, r1": direft("all", "all", 1, 2e-3, 4e-3),
            },
            {"batch_size": 4},
            train_rows=48,
            validation_rows=12,
            held_out_rows=24,
        ),
    )
}


@dataclass(frozen=True)
class Rows:
    """A task's rows: those trained on, those that choose the learning rate, and those that are reported."""

    train: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    held_out: list[dict[str, Any]]
    options: list[dict[str, Any]]

    @staticmethod
    def of(task: Task) -> Rows:
        """Read and split a task's rows; the split is the same each time."""
        if task.name == "persona":
            rows = [{"prompt": row.messages[-1].content, "completion": row.completion} for row in load_demo()]
            random.Random(0).shuffle(rows)
            held_out, train = rows[: task.held_out_rows], rows[task.held_out_rows :]
        else:
            train, held_out = _rows(task.name, "train"), _rows(task.name, "test")
        found = Rows(
            train[: task.train_rows],
            train[task.train_rows : task.train_rows + task.validation_rows],
            held_out[: task.held_out_rows],
            held_out[: task.option_rows],
        )
        short = (len(found.train), len(found.validation), len(found.held_out)) != (
            task.train_rows, task.validation_rows, task.held_out_rows,
        )  # fmt: skip
        if short:
            raise ValueError(f"{task.name} has too few rows: {len(train)} to train on, {len(held_out)} held out")
        return found


def write_rows(rows: list[dict[str, Any]], path: Path, keys: tuple[str, ...] = ("prompt", "completion")) -> str:
    """Write rows as JSONL and return the path."""
    write_text(path, "".join(json.dumps({key: row[key] for key in keys}) + "\n" for row in rows))
    return str(path)


def _rows(name: str, part: str) -> list[dict[str, Any]]:
    if name == "arc":
        rows = [found for row in _read(f"arc_easy/{part}.json") if (found := _answer_text(row))]
        if part == "train":
            rows = rows[len(SHOWN) :]
    else:
        file = "train" if part == "train" else "multiarith_test"
        rows = [
            {"prompt": r["instruction"].strip(), "completion": r["output"]} for r in _read(f"arithmetic/{file}.json")
        ]
    random.Random(0).shuffle(rows)
    return rows


def _read(file: str) -> Sequence[dict[str, Any]]:
    return json.loads((DATA / file).read_text(encoding="utf-8"))


SHOWN = range(4)
"""Training rows that every prompt shows solved, as fixed instructions would."""


def _answer_text(row: dict[str, Any]) -> dict[str, Any] | None:
    """The question alone, to be completed with the right option's text in place of its number."""
    question, options = _parts(row)
    answer = int(row["answer"][-1]) - 1
    if answer >= len(options):
        return None
    return {
        "prompt": f"{_shown()}Question: {question}\nAnswer:",
        "completion": options[answer],
        "options": options,
        "answer": answer,
    }


def _parts(row: dict[str, Any]) -> tuple[str, list[str]]:
    question, texts = row["instruction"].split("\n\nAnswer format")[0].split("\n\n", 1)
    question = question.removeprefix("Please choose the correct answer to the question: ")
    return question, [" " + text.strip() for text in re.split(r"\s*Answer\d: ", " " + texts)[1:]]


@cache
def _shown() -> str:
    rows = [_read("arc_easy/train.json")[index] for index in SHOWN]
    solved = [(_parts(row), int(row["answer"][-1]) - 1) for row in rows]
    return "".join(f"Question: {question}\nAnswer:{options[answer]}\n\n" for (question, options), answer in solved)
