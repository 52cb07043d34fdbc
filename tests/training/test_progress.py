"""Progress is a bar on a terminal and a few lines elsewhere."""

import io
import tempfile
from typing import Any

from rich.console import Console
from transformers import TrainerControl, TrainerState, TrainingArguments

from reftune.training.progress import ProgressBarCallback
from reftune.training.throughput import ThroughputCallback
from tests.training.toy_rows import trainer

ARGUMENTS = TrainingArguments(use_cpu=True)


def _shown(run_settings: dict[str, Any], terminal: bool, every_seconds: float) -> tuple[str, Any]:
    stream = io.StringIO()
    with tempfile.TemporaryDirectory() as folder:
        run = trainer(folder, **run_settings)
        console = Console(file=stream, force_terminal=terminal, width=100, force_interactive=terminal)
        callback = ProgressBarCallback(run.throughput, console, every_seconds)
        run.add_callback(callback)
        run.train()
    return stream.getvalue(), callback


def test_without_a_terminal_there_are_plain_lines() -> None:
    shown, _ = _shown({"eval_strategy": "epoch"}, terminal=False, every_seconds=0.0)
    lines = shown.splitlines()
    assert "\x1b" not in shown
    assert any(line.startswith("step 3/10  loss ") and "tokens/s" in line and "left" in line for line in lines)
    assert len([line for line in lines if "eval loss" in line]) == 2
    assert lines[-1].startswith("step 10/10")


def test_plain_lines_are_few() -> None:
    shown, _ = _shown({}, terminal=False, every_seconds=3600.0)
    assert len(shown.splitlines()) == 1 and shown.startswith("step 10/10")


def test_a_terminal_gets_a_bar_that_goes_away() -> None:
    shown, callback = _shown({"eval_strategy": "epoch"}, terminal=True, every_seconds=0.0)
    assert "10/10" in shown and "tokens/s" in shown and "\x1b[" in shown
    assert "step 5/10  eval loss" in shown.replace("\x1b[2K", "")
    assert callback._bar is None


def test_the_bar_is_closed_when_training_ends_in_an_error() -> None:
    callback = ProgressBarCallback(ThroughputCallback(), Console(file=io.StringIO(), force_terminal=True))
    callback.on_train_begin(ARGUMENTS, TrainerState(max_steps=4), TrainerControl())
    assert callback._bar is not None
    callback.close()
    callback.close()
    assert callback._bar is None


def test_other_processes_show_nothing() -> None:
    stream = io.StringIO()
    callback = ProgressBarCallback(ThroughputCallback(), Console(file=stream))
    state = TrainerState(global_step=4, max_steps=4, is_world_process_zero=False)
    callback.on_train_begin(ARGUMENTS, state, TrainerControl())
    callback.on_log(ARGUMENTS, state, TrainerControl(), logs={"loss": 1.0})
    assert stream.getvalue() == ""


def test_the_trainer_shows_its_own_bar_unless_told_not_to(tmp_path: Any) -> None:
    def kinds(run: Any) -> set[str]:
        return {type(callback).__name__ for callback in run.callback_handler.callbacks}

    assert "ProgressBarCallback" in kinds(trainer(tmp_path, disable_tqdm=False))
    quiet = kinds(trainer(tmp_path, disable_tqdm=True))
    assert not quiet & {"ProgressBarCallback", "ProgressCallback", "PrinterCallback"}
