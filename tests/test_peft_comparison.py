"""benchmarks/peft_comparison: its loop runs from the rows to the record, and measures what it says."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from benchmarks.peft_comparison.__main__ import record, table
from benchmarks.peft_comparison.loop import TrainConfig
from benchmarks.peft_comparison.rows import made, number, read
from reftune import models
from tests.cli.tiny_folder import save_tiny_model


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Any]]:
    """The tiny model, the folder of the records, and two records by method."""
    folder = tmp_path_factory.mktemp("peft")
    model = save_tiny_model(folder / "tiny")
    args = argparse.Namespace(
        model=str(model), folder=folder / "out", full=False, train=None, test=None, steps=1, test_rows=2
    )
    args.folder.mkdir()
    names = {"direft": "direft/tiny-all-rank1", "lora": "lora/tiny-rank4"}
    for name in names.values():
        record(name, args)
    files = {method: args.folder / f"{name.replace('/', '--')}.json" for method, name in names.items()}
    return model, args.folder, {method: json.loads(file.read_text()) for method, file in files.items()}


def test_the_loss_is_of_the_whole_text_and_its_end(records: tuple[Path, Path, dict[str, Any]]) -> None:
    model, _, found = records
    base, tokenizer = models.load(str(model))
    rows = made(4 + 2 + 4, seed=0)[6:]  # after four to watch and two to test
    sums, tokens = 0.0, 0
    for row in rows:
        text = TrainConfig().query_template.format(query=row.query) + row.response
        ids = torch.tensor([[*tokenizer(text).input_ids, tokenizer.eos_token_id]])
        with torch.no_grad():
            logits = base(input_ids=ids).logits[0, :-1]
        sums, tokens = sums + float(F.cross_entropy(logits, ids[0, 1:], reduction="sum")), tokens + ids.shape[1]
    for entry in found.values():  # both methods start as the base model
        last = entry["train_info"]["metrics"][-1]
        assert last["train total tokens"] == tokens and last["train samples"] == 4
        assert last["train loss"] == pytest.approx(sums / (tokens - len(rows)), rel=1e-4)


def test_a_record_has_pefts_fields(records: tuple[Path, Path, dict[str, Any]]) -> None:
    _, folder, found = records
    edit, lora = found["direft"]["train_info"], found["lora"]["train_info"]
    assert edit["num_trainable_params"] == 2 * (2 * 16 + 1)
    assert lora["num_trainable_params"] == 2 * 2 * 4 * (16 + 16)
    for info in (edit, lora):
        assert info["file_size"] > 4 * info["num_trainable_params"] and info["train_time"] > 0
        assert 0 <= info["metrics"][-1]["test accuracy"] <= 1 and info["metrics"][-1]["forgetting"] != 0
        assert {"accelerator_memory_max", "accelerator_memory_reserved_avg", "status", "num_total_params"} <= set(info)
    assert found["lora"]["run_info"]["train_config"]["optimizer_kwargs"] == {"lr": 3e-3, "weight_decay": 0.1}
    assert found["direft"]["run_info"]["peft_config"]["positions"] == "all"
    lines = table(folder).splitlines()
    assert len(lines) == 4 and lines[2].startswith("| direft/tiny-all-rank1 | 66 |")


@pytest.mark.parametrize(
    ("text", "value"),
    [(" 7 + 5 = 12. The answer is: 12", 12), ("so\n#### 1,234", 1234), ("The answer is -2.5.", -2.5), ("12", None)],
)
def test_an_answers_number_is_what_stands_after_its_words(text: str, value: float | None) -> None:
    assert number(text) == value


def test_rows_of_a_file_are_read_by_either_pair_of_columns(tmp_path: Path) -> None:
    math, word = tmp_path / "math.jsonl", tmp_path / "word.jsonl"
    math.write_text('{"query": "q", "response": "The answer is: 3", "type": "x"}\n{"query": "q", "response": "none"}\n')
    word.write_text('{"question": "q", "answer": "#### 3"}\n')
    assert read(str(math)) == [("q", " The answer is: 3")] and read(str(word)) == [("q", " #### 3")]
