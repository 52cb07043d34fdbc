"""Progress of training: a bar with loss, tokens a second and time left; a few plain lines where no terminal is."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState

from reftune.output import terminal
from reftune.training.throughput import ThroughputCallback


def seconds_between_lines() -> float:
    """Time between two lines of progress where there is no terminal: ``REFTUNE_PROGRESS_SECONDS``, or 5."""
    return float(os.environ.get("REFTUNE_PROGRESS_SECONDS", "5"))


def time_left(seconds: float, done: int, left: int) -> str:
    """How long ``left`` more will take, as `1:05 left`, where ``done`` took so many seconds."""
    more = round(seconds / done * left)
    return f"{more // 60}:{more % 60:02d} left"


def print_line(console: Console, line: str) -> None:
    """A line as it is, however long and whatever it holds."""
    console.print(line, highlight=False, markup=False, soft_wrap=True)


class ProgressBarCallback(TrainerCallback):
    """Shows how training goes on standard error.

    On a terminal: one bar, removed at the end, above it a line for each evaluation. Elsewhere (a log file, CI): one
    line every ``every_seconds``, one for each evaluation, and the last.

    Args:
        throughput: where tokens a second come from.
        console: where to print; standard error by default.
        every_seconds: time between two lines where there is no terminal; ``REFTUNE_PROGRESS_SECONDS``, or 5, if None.
        shown: names of what is logged that are shown, of training and (with ``eval_``) of evaluation; None: the loss,
            and all that an evaluation gives.
    """

    def __init__(
        self,
        throughput: ThroughputCallback,
        console: Console | None = None,
        every_seconds: float | None = None,
        shown: Sequence[str] | None = None,
    ) -> None:
        self._shown = shown
        self._throughput = throughput
        self._console = console if console is not None else terminal.console(stderr=True)
        self._every_seconds = seconds_between_lines() if every_seconds is None else every_seconds
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._now = ""
        self._first_step = 0
        self._began = self._last_line = 0.0

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Show the bar at the step that training starts from."""
        self._now = ""
        self._began = self._last_line = time.monotonic()
        self._first_step = state.global_step
        if not state.is_world_process_zero or not self._console.is_terminal:
            return
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
        )
        self._task = self._bar.add_task("training", total=state.max_steps, completed=state.global_step, status="")
        self._bar.start()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move on by a step."""
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step)

    def on_log(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the loss; a line of its own for an evaluation."""
        if not state.is_world_process_zero or not logs:
            return
        scores = {
            name: value
            for name, value in logs.items()
            if name.startswith("eval_") and not name.endswith(("_runtime", "_per_second", "_time"))
            if self._shown is None or name.removeprefix("eval_") in self._shown
        }
        if scores:
            text = "  ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in scores.items())
            self._print(f"step {state.global_step}/{state.max_steps}  {text}")
        if "loss" not in logs:
            return
        self._now = "  ".join(
            f"{name} {float(logs[name]):.4f}" for name in self._shown or ("loss",) if logs.get(name) is not None
        )
        if self._bar is not None:
            self._bar.update(self._task, status=self._status())
        elif time.monotonic() - self._last_line >= self._every_seconds or state.global_step >= state.max_steps:
            self._last_line = time.monotonic()
            self._print(f"step {state.global_step}/{state.max_steps}  {self._status()}{self._time_left(state)}")

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Take the bar away."""
        self.close()

    def close(self) -> None:
        """Give the terminal back; also called when training ends in an exception."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _status(self) -> str:
        speed = self._throughput.tokens_per_second
        return f"{self._now}  {speed:,.0f} tokens/s" if speed else self._now

    def _time_left(self, state: TrainerState) -> str:
        done = state.global_step - self._first_step
        left = state.max_steps - state.global_step
        if done <= 0 or left <= 0:
            return ""
        return f"  {time_left(time.monotonic() - self._began, done, left)}"

    def _print(self, line: str) -> None:
        print_line(self._console, line)
