"""What `reftune train` chooses, tells and writes where it is given rows alone."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cli.tiny_folder import write_rows


def train(cli: Any, tiny: Path, folder: Path, *flags: object) -> Any:
    rows = write_rows(folder / "rows.csv")
    out = folder / "out"
    result = cli(
        "train", "--train-file", rows, "--model", tiny, "--output", out, "--no-tensorboard", "--device", "cpu", *flags
    )
    assert result.exit_code == 0, result.output
    return result, yaml.safe_load((out / "run.yaml").read_text()), json.loads((out / "metrics.json").read_text())


def test_what_was_chosen_is_written_and_gone_on_with(cli: Any, tiny: Path, tmp_path: Path) -> None:
    result, written, metrics = train(cli, tiny, tmp_path, "--epochs", 1, "--layers", "8/32")
    assert written["layers"] == 1 and isinstance(written["lr"], float)
    assert (written["method"], written["rank"], written["positions"]) == ("direft", 1, "l1+generated")
    for told in ("12 rows", f"learning rate {written['lr']:g}", f"{metrics['trainable_parameters']} trainable"):
        assert told in result.stderr
    _, again, metrics = train(cli, tiny, tmp_path, "--epochs", 2, "--layers", "8/32", "--resume")
    assert again["lr"] == written["lr"] and metrics["steps"] == 4
    old = tmp_path / "out" / "run.yaml"
    old.write_text(old.read_text().replace("method: direft", "method: loreft"))
    refused = cli("train", "--train-file", tmp_path / "rows.csv", "--model", tiny, "--output", old.parent, "--resume")
    assert refused.exit_code == 2 and f"reftune train {old} --resume" in refused.stderr


def test_an_automatic_batch_takes_the_same_steps(
    cli: Any, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("plain", "auto"):
        (tmp_path / name).mkdir()
    _, _, plain = train(cli, tiny, tmp_path / "plain", "--epochs", 2, "--lr", 0.01)
    monkeypatch.setattr("reftune.runs.recipe.affordable_tokens", lambda base: 140)
    _, written, auto = train(cli, tiny, tmp_path / "auto", "--epochs", 2, "--lr", 0.01, "--batch-size", "auto")
    assert (written["batch_size"], written["gradient_accumulation"]) == (2, 4)
    assert auto["steps"] == plain["steps"] and math.isclose(auto["train_loss"], plain["train_loss"], rel_tol=1e-4)


def test_quiet_prints_neither_plan_nor_progress(cli: Any, tiny: Path, tmp_path: Path) -> None:
    result, _, _ = train(cli, tiny, tmp_path, "--epochs", 1, "--quiet")
    assert "rows" not in result.stderr and "step" not in result.stderr
