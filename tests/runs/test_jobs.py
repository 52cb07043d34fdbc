"""What each of several jobs gets of the machine."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch

from reftune.errors import ReftuneError
from reftune.evaluation.task_report import evaluate_apart
from reftune.runs.jobs import Jobs, environments


def _gpus(monkeypatch: pytest.MonkeyPatch, count: int, visible: str | None = None) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)


@pytest.mark.parametrize(
    ("count", "visible", "device", "expected"),
    [
        (2, None, None, ["0", "1", "0"]),
        (3, "4,GPU-6,7", "cuda", ["4", "GPU-6", "7"]),
        (4, None, "cuda:1", [None] * 3),  # asked for: all take it
        (4, None, "cpu", [None] * 3),
        (0, None, None, [None] * 3),
    ],
)
def test_jobs_take_gpus_in_turn_and_share_the_cores(
    count: int, visible: str | None, device: str | None, expected: list[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    _gpus(monkeypatch, count, visible)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    found = environments(3, device)
    assert [one.get("CUDA_VISIBLE_DEVICES") for one in found] == expected
    assert [one["OMP_NUM_THREADS"] for one in found] == ["2"] * 3
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert environments(2, device)[0]["OMP_NUM_THREADS"] == "5"


def test_one_job_has_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    _gpus(monkeypatch, 4, "2,3,4,5")
    (only,) = environments(1, None)
    assert only["CUDA_VISIBLE_DEVICES"] == "2,3,4,5" and "OMP_NUM_THREADS" not in only
    with pytest.raises(ReftuneError, match="jobs=0"):
        environments(0, None)


def test_processes_at_a_time_have_different_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    _gpus(monkeypatch, 2)
    jobs, both, held = Jobs(2, None), threading.Barrier(2, timeout=60), []
    program = "import os; print(os.environ['CUDA_VISIBLE_DEVICES'])"

    def work(_: int) -> None:
        with jobs.running([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
            held.append(process.communicate()[0].strip())
            both.wait()
            assert sorted(held[-2:]) == ["0", "1"]
            both.wait()

    jobs.each(work, range(4))
    assert len(held) == 4


def test_a_task_that_cannot_be_evaluated_says_why() -> None:
    said = "import sys; sys.exit('a line\\nError: no rows')"
    with pytest.raises(ReftuneError, match="^task mawps: no rows$"):
        evaluate_apart({"mawps": [sys.executable, "-c", said]}, 2, "cpu")


def test_the_first_error_ends_the_other_processes() -> None:
    jobs = Jobs(2, "cpu")

    def work(item: int) -> None:
        with jobs.running([sys.executable, "-c", "import time; time.sleep(600)"]) as process:
            if item == 0:
                process.kill()
                raise ReftuneError("the first failed")

    with pytest.raises(ReftuneError, match="the first failed"):
        jobs.each(work, range(4))
    assert jobs.stopped
