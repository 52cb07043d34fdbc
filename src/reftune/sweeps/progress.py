"""How a sweep goes, on a terminal: a bar of trials with the best so far, one of the trial's steps, a line a trial."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from reftune.sweeps.records import TrialRecord
from reftune.sweeps.report import settings_text
from reftune.sweeps.space import label_of


class SweepProgress:
    """Shows trials as they come; without a terminal only the lines.

    Args:
        console: where to print.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars: Progress | None = None
        self._trials = self._steps = TaskID(0)

    @contextmanager
    def running(self, done: int, wanted: int, best: str) -> Iterator[None]:
        """Show the bars for the length of a ``with`` block, from `done` trials of `wanted` on."""
        if not self._console.is_terminal:
            yield
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
        )
        with Progress(*columns, TimeElapsedColumn(), console=self._console, transient=True) as bars:
            self._bars = bars
            self._trials = bars.add_task("trials", total=wanted, completed=done, text=best)
            self._steps = bars.add_task("steps", total=None, text="")
            try:
                yield
            finally:
                self._bars = None

    def begin_trial(self, number: int, settings: Mapping[str, Any]) -> None:
        """A trial begins."""
        if self._bars is not None:
            text = settings_text({name: label_of(value) for name, value in settings.items()})
            self._bars.reset(self._steps, description=f"trial {number}", total=None, text=text)

    def count(self, done: int, best: str) -> None:
        """So many trials are over, and the best so far."""
        if self._bars is not None:
            self._bars.update(self._trials, completed=done, text=best)

    def step(self, done: int, total: int) -> None:
        """The trial has made a step."""
        if self._bars is not None:
            self._bars.update(self._steps, completed=done, total=total)

    def end_trial(self, record: TrialRecord, done: int, best: str) -> None:
        """A trial is over: its line, and the best so far."""
        self.count(done, best)
        value = "" if record.value is None else f"  loss {record.value:.4f}"
        note = f"  ({record.note})" if record.note else ""
        seconds = "" if record.seconds is None else f"  {record.seconds:.1f} s"
        state = "" if record.state == "complete" else f"  {record.state}"
        self.say(f"trial {record.number}{state}{value}{seconds}  {settings_text(record.settings)}{note}  {best}")

    def say(self, line: str) -> None:
        """A line above the bars."""
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)
