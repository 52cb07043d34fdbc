"""A tiny model folder, rows, and a finished run, made once a session; nobody writes into them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from reftune.cli import app
from tests.cli.tiny_folder import save_tiny_model, write_rows


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def other_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "other", hidden=24)


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "rows.csv")


@pytest.fixture
def cli() -> Callable[..., Any]:
    """Runs a command in this process; its result has `exit_code`, `stdout` and `stderr`."""

    def run(*arguments: object, stdin: str | None = None) -> Any:
        return CliRunner().invoke(app, [str(part) for part in arguments], input=stdin)

    return run


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny: Path, rows: Path) -> Path:
    """The output folder of a short run."""
    folder = tmp_path_factory.mktemp("runs") / "out"
    result = CliRunner().invoke(
        app,
        ["train", "--train-file", str(rows), "--model", str(tiny), "--method", "loreft", "--positions", "l1", "--layers", "1",
         "--rank", "2", "--epochs", "2", "--batch-size", "4", "--eval-fraction", "0.25", "--lr", "0.05", "--output", str(folder), "--no-tensorboard",
         "--device", "cpu"],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    return folder
