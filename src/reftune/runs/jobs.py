"""Several runs at a time (`--jobs`): each in a process of its own, on a GPU of its own or with some of the cores."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any, TypeVar

from reftune.errors import ReftuneError

_Item = TypeVar("_Item")


def environments(jobs: int, device: str | None) -> list[dict[str, str]]:
    """The environment of each job: GPUs in turn where the runs choose one themselves, and a share of the cores.

    Args:
        jobs: how many run at a time; one has everything.
        device: of the runs; None and ``"cuda"`` leave the choice open, anything else is what they all take.

    Raises:
        ReftuneError: fewer than one job.
    """
    if jobs < 1:
        raise ReftuneError(f"jobs={jobs}: give at least 1.")
    shared = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    if jobs == 1:
        return [shared]
    shared.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))  # else each takes every core
    gpus = _gpus() if device in (None, "cuda") else []
    return [{**shared, **({"CUDA_VISIBLE_DEVICES": gpus[job % len(gpus)]} if gpus else {})} for job in range(jobs)]


def _gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (named.split(",") if named else [str(number) for number in range(count)])[:count]


class Jobs:
    """Processes of which so many run at a time; ends those of its own that are left.

    Args:
        jobs: how many.
        device: as for `environments`.

    Attributes:
        stopped: no further process is started.
    """

    def __init__(self, jobs: int, device: str | None) -> None:
        self.stopped = False
        self._running: set[subprocess.Popen[str]] = set()
        self._lock = threading.Lock()
        self._free: SimpleQueue[dict[str, str]] = SimpleQueue()
        self._count = jobs
        for environment in environments(jobs, device):
            self._free.put(environment)

    @contextmanager
    def running(self, command: Sequence[str], **streams: Any) -> Iterator[subprocess.Popen[str]]:
        """Start a process in a free job's environment; it has ended when the ``with`` block is left.

        Args:
            command: the process's.
            **streams: `subprocess.Popen`'s stdout and stderr.

        Raises:
            ReftuneError: the jobs were stopped.
        """
        environment = self._free.get()
        try:
            with self._lock:
                if self.stopped:
                    raise ReftuneError("stopped")
                process = subprocess.Popen(
                    command, env=environment, stdin=subprocess.DEVNULL, text=True, encoding="utf-8", errors="replace",
                    **streams,
                )  # fmt: skip
                self._running.add(process)
            try:
                yield process
            finally:
                process.wait()
                with self._lock:
                    self._running.discard(process)
        finally:
            self._free.put(environment)

    def each(self, work: Callable[[_Item], None], items: Iterable[_Item]) -> None:
        """Do ``work`` on every item, so many at a time; the first error (or Ctrl-C) **ends the others' processes**."""
        with ThreadPoolExecutor(self._count) as pool:
            futures = [pool.submit(work, item) for item in items]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                self.stop()
                raise

    def stop(self) -> None:
        """**End** what is running, and start nothing more."""
        with self._lock:
            self.stopped = True
            for process in self._running:
                process.terminate()
