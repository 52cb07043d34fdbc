"""Progress of a comparison: a bar over all its steps and a line for each run; plain lines where no terminal is."""

from __future__ import annotations

import threading
import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from reftune.comparison.results import RunResult


class ComparisonProgress:
    """Shows how the runs go on; may be told from several threads.

    Args:
        runs: runs of the whole comparison.
        done: those that need not run again.
        steps: optimiser steps of a run.
        console: where to print.
    """

    def __init__(self, runs: int, done: int, steps: int, console: Console) -> None:
        self._runs, self._done, self._steps, self._console = runs, done, max(steps, 1), console
        self._done_before = done
        self._lock = threading.Lock()
        self._tasks: dict[str, TaskID] = {}
        self._begun: dict[str, float] = {}
        self._status: dict[str, dict[str, Any]] = {}
        self._bar: Progress | None = None
        self._all = TaskID(0)

    def __enter__(self) -> ComparisonProgress:
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TextColumn("{task.fields[status]}", markup=False),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
            )
            left = self._runs - self._done
            self._all = self._bar.add_task(f"{left} runs", total=left * self._steps, status=self._count())
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def begin(self, run: str) -> None:
        """A run starts."""
        with self._lock:
            self._begun[run], self._status[run] = time.monotonic(), {}
            if self._bar is not None:
                self._tasks[run] = self._bar.add_task(f"  {run}", total=self._steps, status="starting")

    def tell(self, run: str, news: dict[str, Any]) -> None:
        """News of a run (see `single_run.Progress`)."""
        with self._lock:
            if self._bar is None:
                return
            known = self._status.setdefault(run, {})
            known.update({name: value for name, value in news.items() if name != "doing"})
            parts = [f"loss {known['loss']:.3f}"] if "loss" in known else []
            parts += [f"held-out {known['held_out']:.4f}"] if "held_out" in known else []
            if "doing" in news:
                parts = [str(news["doing"])]
            self._bar.update(
                self._tasks[run],
                total=known.get("steps", self._steps),
                completed=known.get("step", 0),
                status="  ".join(parts),
            )
            open_steps = sum(int(self._status[name].get("step", 0)) for name in self._tasks)
            self._bar.update(self._all, completed=self._finished_steps() + open_steps)

    def end(self, run: str, result: RunResult | None, failure: str = "") -> None:
        """A run is over, with its result or with why there is none."""
        with self._lock:
            self._done += 1
            if self._bar is not None and run in self._tasks:
                self._bar.remove_task(self._tasks.pop(run))
                self._bar.update(self._all, status=self._count(), completed=self._finished_steps())
            took = time.monotonic() - self._begun.get(run, time.monotonic())
            if result is None:
                text = f"{self._count()}  {run}: failed: {failure}"
            else:
                text = (
                    f"{self._count()}  {run}: held-out loss {result.loss:.4f}, "
                    f"{result.trainable_parameters:,} parameters, {result.train_seconds:.1f} s of training "
                    f"({took:.0f} s in all)"
                )
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _finished_steps(self) -> int:
        return (self._done - self._done_before) * self._steps

    def _count(self) -> str:
        return f"{self._done}/{self._runs}"
