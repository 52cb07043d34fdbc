"""`reftune train --streaming`: a run of rows that are never all held, resumed to the same end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file


@pytest.fixture
def flags(tiny: Path, tmp_path: Path) -> list[Any]:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"say {n}", "completion": f"it is {n}"}) + "\n" for n in range(10)))
    return [
        "train", "--train-file", rows, "--model", tiny, "--layers", 1, "--rank", 2, "--batch-size", 2, "--streaming",
        "--stream-buffer", 4, "--schedule", "constant", "--no-tensorboard", "--device", "cpu", "--save-steps", 3,
    ]  # fmt: skip


def test_a_streamed_run_keeps_no_prefixes_and_resumes_to_the_same_end(
    flags: list[Any], cli: Any, tmp_path: Path
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    result = cli(*flags, "--output", whole, "--max-steps", 9)  # almost two passes
    assert result.exit_code == 0 and "rows as they are read; 0 rows held out" in result.stderr
    assert "9 steps of 2 rows, learning rate" in result.stderr
    assert cli(*flags, "--output", broken, "--max-steps", 6).exit_code == 0
    resumed = cli(*flags, "--output", broken, "--max-steps", 9, "--resume")
    assert resumed.exit_code == 0, resumed.output
    metrics = json.loads((whole / "metrics.json").read_text())
    assert metrics["steps"] == 9 and metrics["train_rows"] is None and metrics["prefix_reuse"] == "on"
    assert metrics["prefix_store"]["memory_bytes"] == metrics["prefix_store"]["disk_bytes"] == 0
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (whole, broken))
    assert all((first[name] - second[name]).abs().max() < 1e-6 for name in first)


def test_what_streaming_cannot_do_is_one_error(flags: list[Any], cli: Any, tmp_path: Path) -> None:
    for more, message in (
        ([], "streaming=true: nobody knows how many rows will come; say when to stop with max_steps."),
        (["--max-steps", 3, "--eval-fraction", 0.5], "--eval-fraction=0.5 does not go with streaming"),
        (["--max-steps", 3, "--show", 1], "--show=1 does not go with streaming"),
    ):
        result = cli(*flags, "--output", tmp_path / "out", *more)
        assert result.exit_code == 2 and message in result.stderr, result.output
    assert not (tmp_path / "out").exists()
