"""Defaults that suit an edit, and everything else as in transformers."""

from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

from transformers import HfArgumentParser, TrainingArguments

from reftune.training import arguments
from reftune.training.arguments import ReftTrainingArguments
from tests.training.toy_rows import trainer


def test_the_defaults_are_those_of_an_edit(tmp_path: Path) -> None:
    made = ReftTrainingArguments(output_dir=str(tmp_path))
    assert made.learning_rate == 4e-3 and made.weight_decay == 0 and made.lr_scheduler_type == "linear"
    assert made.train_sampling_strategy == "group_by_length" and not made.remove_unused_columns
    assert made.report_to == ["tensorboard"] and made.seed == 42 and made.supervised_logits_only


def test_every_field_that_differs_has_help_and_a_type() -> None:
    own = {field.name for field in fields(ReftTrainingArguments)} - {field.name for field in fields(TrainingArguments)}
    assert own == {"supervised_logits_only", "prefix_reuse", "prefix_cache_gib", "objective", "factors"}
    hints = get_type_hints(ReftTrainingArguments)
    for field in fields(ReftTrainingArguments):
        if field.name in ReftTrainingArguments.__annotations__:
            assert field.metadata["help"] and field.name in hints


def test_a_command_line_can_be_made_of_it(tmp_path: Path) -> None:
    parsed = HfArgumentParser(ReftTrainingArguments).parse_args_into_dataclasses(  # type: ignore[arg-type]
        ["--output_dir", str(tmp_path), "--supervised_logits_only", "False", "--learning_rate", "0.1"]
    )[0]
    assert parsed.learning_rate == 0.1 and not parsed.supervised_logits_only


def test_without_tensorboard_training_goes_on_without_it(tmp_path: Path, monkeypatch: Any, caplog: Any) -> None:
    monkeypatch.setattr(arguments, "is_tensorboard_available", lambda: False)
    assert ReftTrainingArguments(output_dir=str(tmp_path)).report_to == []
    assert "pip install tensorboard" in caplog.text


def test_tensorboard_gets_the_loss(tmp_path: Path) -> None:
    trainer(tmp_path, report_to="tensorboard").train()
    assert list((tmp_path / "runs").rglob("events.out.tfevents.*"))
