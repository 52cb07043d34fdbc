"""Adapters trained from the page: one at a time, in a process of its own, offered when they are whole."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

from reftune.errors import ReftuneError
from reftune.output.files import write_text
from reftune.serving.catalogue import Catalogue
from reftune.users.names import is_name

_STEP = re.compile(r"step (\d+)/(\d+)\s+loss (\S+)")
_KEPT_LINES = 200


@dataclass
class Run:
    """A training run.

    Attributes:
        name: of the adapter it makes.
        losses: (step, steps in all, loss) as they come.
        lines: the last lines that it printed.
        state: `running`, `done`, `failed` or `stopped`.
        error: why it failed.
    """

    name: str
    losses: list[tuple[int, int, float]] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    state: str = "running"
    error: str = ""

    def read(self, line: str) -> None:
        """Take in a line of the process."""
        self.lines = [*self.lines[1 - _KEPT_LINES :], line]
        if found := _STEP.search(line):
            self.losses.append((int(found[1]), int(found[2]), float(found[3])))


class Trainings:
    """The runs of one server.

    Args:
        model: the base, as `reftune train --model` takes it.
        catalogue: where finished adapters are offered; they lie in its first folder.
        device: of the training.
    """

    def __init__(self, model: str, catalogue: Catalogue, device: str | None = None):
        self.model, self.catalogue, self.device = model, catalogue, device
        self.runs: dict[str, Run] = {}
        self._process: asyncio.subprocess.Process | None = None
        self._task: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()

    def start(self, name: str, table: str, epochs: int, rate: float, positions: str, rank: int) -> Run:
        """Begin a run; returns at once.

        Args:
            name: of the adapter.
            table: the file's text: CSV with the columns prompt and completion, or JSONL.
            epochs: times that the rows are read.
            rate: learning rate.
            positions: which tokens are edited.
            rank: of the edit.

        Raises:
            ReftuneError: a run is going on, the name is taken or none, or there is no folder to put it in.
        """
        if self._task is not None and not self._task.done():
            raise ReftuneError("a training run is going on: wait for it, or stop it.")
        if not is_name(name):
            raise ReftuneError(f"name={name!r}: an adapter's name has no slashes and no leading dot.")
        if not self.catalogue.folders:
            raise ReftuneError("the server was started without --adapters DIR, so there is no folder for new adapters.")
        target = self.catalogue.folders[0] / name
        if target.exists() or self.catalogue.folder(name) is not None:
            raise ReftuneError(f"name={name!r}: there is one of that name already.")
        scratch = target.with_name(f".training-{name}")
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        kind = "jsonl" if table.lstrip().startswith("{") else "csv"
        rows = target.with_name(".rows") / f"{name}.{kind}"
        rows.parent.mkdir(exist_ok=True)
        write_text(rows, table)  # it stays: the adapter's run.yaml names it
        flags = {
            "--train-file": rows,
            "--model": self.model,
            "--output": scratch / "run",
            "--method": "direft",
            "--layers": "all",
            "--positions": positions,
            "--rank": rank,
            "--epochs": epochs,
            "--lr": rate,
            "--batch-size": 4,
            "--log-every": 1,
            **({"--device": self.device} if self.device else {}),
        }
        arguments = [str(part) for flag in flags.items() for part in flag] + ["--no-tensorboard"]
        run = self.runs[name] = Run(name)
        self._task = asyncio.ensure_future(self._carry_out(run, arguments, scratch, target))
        return run

    async def _carry_out(self, run: Run, arguments: list[str], scratch: Path, target: Path) -> None:
        try:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-c", "from reftune.cli import main; main()", "train", *arguments,
                stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
                env=os.environ | {"NO_COLOR": "1", "COLUMNS": "200", "REFTUNE_PROGRESS_SECONDS": "0.1"},
            )  # fmt: skip
            if run.state == "stopped":  # while the process was being made
                self.stop()
            assert self._process.stdout is not None
            async for line in self._process.stdout:
                run.read(line.decode("utf-8", "replace").rstrip())
                self._tell()
            status = await self._process.wait()
            if run.state == "stopped":
                return
            if status == 0:
                os.rename(scratch / "run", target)
                self.catalogue.look_again()
                run.state = "done"
            else:
                said = [line for line in run.lines if line]
                run.state, run.error = "failed", said[-1] if said else f"it ended with status {status}"
        except BaseException as error:
            run.state, run.error = "failed", str(error) or type(error).__name__
            if self._process is not None and self._process.returncode is None:
                self._process.kill()
            raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
            self._tell()

    def stop(self) -> None:
        """End the run that is going on, if any."""
        for run in self.runs.values():
            if run.state == "running":
                run.state = "stopped"
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(signal.SIGTERM)

    async def close(self) -> None:
        """Stop, and wait for the process to end."""
        self.stop()
        if self._task is not None:
            await asyncio.wait({self._task}, timeout=10)

    async def follow(self, run: Run) -> AsyncIterator[Run]:
        """The run each time it has news, until it has ended."""
        while True:
            changed = self._changed
            yield run
            if run.state != "running" and (self._task is None or self._task.done()):
                return
            await changed.wait()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
