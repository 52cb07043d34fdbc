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

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
FOUR = [10, 14, 18, 22]
LORA = {"method": "lora", "target_modules": ["q_proj", "v_proj"]}


@dataclass(frozen=True)
class Task:
    """One comparison: its rows, the shared settings, and the methods that are compared."""

    name: str
    title: str
    methods: dict[str, Any]
    shared: dict[str, Any] = field(default_factory=dict)
    train_rows: int = 80
    held_out_rows: int = 40
    option_rows: int = 0
    pyreft: str = ""
    """The method that pyreft is trained beside, with equal settings."""


def edit(positions: str, layers: Any, rank: int, lr: float, **more: Any) -> dict[str, Any]:
    return {"method": "loreft", "positions": positions, "layers": layers, "rank": rank, "lr": lr, **more}


def lora(rank: int, lr: float) -> dict[str, Any]:
    return {**LORA, "rank": rank, "lr": lr}


TASKS = {
    task.name: task
    for task in (
        Task(
            "arc",
            "ARC-Easy, the answer's text after a solved example: long prompts, short completions",
            {
                "base": "base",
                "LoRA r8, lr 3e-3": lora(8, 3e-3),
                "LoRA r1": lora(1, 3e-3),
                "LoReFT l1, four layers": edit("l1", FOUR, 4, 6e-3),
                "LoReFT l1, all layers, r1": edit("l1", "all", 1, 4e-3),
                "LoReFT l1, all layers, r4": edit("l1", "all", 4, 2e-3),
                "LoReFT l1, all layers, r4, paper's start": edit("l1", "all", 4, 2e-3, init="paper"),
                "DiReFT l1, all layers, r4": {**edit("l1", "all", 4, 2e-3), "method": "direft"},
                "LoReFT f7+l7, all layers, r1": edit("f7+l7", "all", 1, 2e-3),
                "LoReFT prompt, four layers": edit("prompt", FOUR, 4, 6e-3),
            },
            {"template": "%s"},
            option_rows=60,
            pyreft="LoReFT l1, all layers, r4, paper's start",
        ),
        Task(
            "arithmetic",
            "Word problems with worked steps: short prompts, long completions",
            {
                "base": "base",
                "LoRA r8, lr 3e-3": lora(8, 3e-3),
                "LoRA r1": lora(1, 3e-3),
                "LoReFT l1, four layers": edit("l1", FOUR, 4, 6e-3),
                "LoReFT l1, all layers, r4": edit("l1", "all", 4, 2e-3),
                "LoReFT f7+l7, all layers, r1": edit("f7+l7", "all", 1, 2e-3),
                "LoReFT all tokens, four layers": edit("all", FOUR, 4, 6e-3),
            },
            {"template": "Q: %s"},
            train_rows=48,
            held_out_rows=24,
        ),
        Task(
            "persona",
            "A pirate's manner (the bundled rows): every token of the answer changes",
            {
                "base": "base",
                "LoRA r8, lr 3e-3": lora(8, 3e-3),
                "LoRA r1": lora(1, 3e-3),
                "LoReFT l1, four layers": edit("l1", FOUR, 4, 6e-3),
                "LoReFT all tokens, four layers": edit("all", FOUR, 4, 6e-3),
                "DiReFT all tokens, four layers": {**edit("all", FOUR, 4, 6e-3), "method": "direft"},
            },
            {"batch_size": 4},
        ),
    )
}


def prepare(task: Task, folder: Path) -> dict[str, Any]:
    """Write the task's rows and return the files' part of a comparison recipe."""
    if task.name == "persona":
        return {"train_file": "demo", "eval_fraction": 0.25}
    train, held_out = _rows(task.name, "train"), _rows(task.name, "test")
    files = {
        "train_file": (train[: task.train_rows], ("prompt", "completion")),
        "eval_file": (held_out[: task.held_out_rows], ("prompt", "completion")),
    }
    if task.option_rows:
        files["options"] = (held_out[: task.option_rows], ("prompt", "options", "answer"))
    found = {}
    for name, (rows, keys) in files.items():
        path = folder / f"{task.name}-{name}.jsonl"
        path.write_text("".join(json.dumps({key: row[key] for key in keys}) + "\n" for row in rows), encoding="utf-8")
        found[name] = str(path)
    return found


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


SHOWN = range(1)
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
