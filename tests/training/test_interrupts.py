"""Ctrl-C saves, and the resumed run is the one that was never stopped."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from reftune.training.checkpoints import incomplete_reason, last_complete_checkpoint
from reftune.training.interrupts import InterruptCallback
from tests.training.toy_rows import history, reft_model, trainer, weights


class Stop(TrainerCallback):
    """Ends training at an event of a step: by an exception, or by the signal that Ctrl-C sends."""

    def __init__(self, event: str, step: int, how: str = "raise") -> None:
        self.event, self.step, self.how = event, step, how

    def _act(self, state: Any) -> None:
        if state.global_step != self.step:
            return
        if self.how == "raise":
            raise KeyboardInterrupt
        os.kill(os.getpid(), signal.SIGINT)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.event == "step_begin":
            self._act(state)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.event == "update":
            self._act(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.event == "step_end":
            self._act(state)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.event == "epoch_begin":
            self._act(state)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.event == "evaluation":
            self._act(state)


@pytest.mark.parametrize(
    ("event", "step", "how", "saved"),
    [
        ("step_end", 3, "raise", 3),
        ("step_begin", 3, "raise", 3),
        ("epoch_begin", 5, "raise", 5),
        ("step_begin", 3, "signal", 4),  # the running step is finished first
        ("update", 6, "signal", 7),
        ("evaluation", 4, "signal", 5),
        ("step_end", 5, "signal", 5),
    ],
)
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(
    tmp_path: Path, event: str, step: int, how: str, saved: int, determinism: None
) -> None:
    settings: dict[str, Any] = {
        "full_determinism": True,
        "num_train_epochs": 3,
        "logging_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 4,
    }
    whole = trainer(tmp_path / "whole", reft_model(dropout=0.3), **settings)
    whole.train()

    stopped = trainer(tmp_path / "stopped", reft_model(dropout=0.3), [Stop(event, step, how)], **settings)
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    checkpoint = last_complete_checkpoint(tmp_path / "stopped")
    assert checkpoint == str(tmp_path / "stopped" / f"checkpoint-{saved}")

    torch.manual_seed(99)
    resumed = trainer(tmp_path / "stopped", reft_model(dropout=0.3), **settings)
    resumed.train(resume_from_checkpoint=True)
    for name, weight in weights(whole.model).items():
        assert torch.equal(weights(resumed.model)[name], weight), name
    assert history(resumed) == history(whole)


def test_nothing_is_saved_of_half_an_update(tmp_path: Path) -> None:
    run = trainer(tmp_path, reft_model(), [Stop("update", 4)], save_strategy="steps", save_steps=2)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")


def test_nothing_is_saved_before_the_first_step(tmp_path: Path) -> None:
    run = trainer(tmp_path, reft_model(), [Stop("step_begin", 0)])
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert last_complete_checkpoint(tmp_path) is None


def test_a_second_ctrl_c_stops_at_once() -> None:
    interrupts = InterruptCallback()
    with interrupts.listening():
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupts.asked and not interrupts.hurried
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            signal.pause()
    assert interrupts.hurried


def test_a_handler_of_the_program_s_own_is_left_alone() -> None:
    def mine(signum: int, frame: Any) -> None: ...

    signal.signal(signal.SIGINT, mine)
    try:
        with InterruptCallback().listening():
            assert signal.getsignal(signal.SIGINT) is mine
        assert signal.getsignal(signal.SIGINT) is mine
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def test_a_kill_while_saving_leaves_the_earlier_checkpoint(tmp_path: Path) -> None:
    script = textwrap.dedent(
        f"""
        import os, signal, torch
        from tests.training.toy_rows import trainer

        save, seen = torch.save, []

        def killing_save(state, path, *args, **kwargs):
            if str(path).endswith("optimizer.pt"):
                seen.append(path)
                if len(seen) == 2:
                    os.kill(os.getpid(), signal.SIGKILL)
            return save(state, path, *args, **kwargs)

        torch.save = killing_save
        trainer({str(tmp_path)!r}, save_strategy="steps", save_steps=3).train()
        """
    )
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), str(root / "src")])
    done = subprocess.run([sys.executable, "-c", script], cwd=root, env={**os.environ, "PYTHONPATH": path}, timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-3")
    assert not (tmp_path / "checkpoint-6").exists(), "half a checkpoint must not look like one"
    run = trainer(tmp_path, save_strategy="steps", save_steps=3)
    run.train(resume_from_checkpoint=True)
    assert run.state.global_step == 10
    assert not [entry for entry in tmp_path.iterdir() if entry.name.startswith(".")], "leftovers are cleared"
    assert incomplete_reason(tmp_path / "checkpoint-9") is None
