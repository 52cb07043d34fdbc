"""`reftune import-pyreft`: what it writes, what it says, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).parent.parent / "pyreft" / "golden"


def test_a_pyreft_folder_becomes_an_adapter_and_what_it_lacks_is_said(cli: Callable[..., Any], tmp_path: Path) -> None:
    result = cli("import-pyreft", GOLDEN / "loreft", "--output", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert "positions: taken as l1 (give --positions)" in result.stdout
    assert "dropout" in result.stdout and "activation" in result.stdout and "--model" in result.stdout


def test_model_and_positions_are_recorded(cli: Callable[..., Any], tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = cli("import-pyreft", GOLDEN / "loreft", "--output", out, "--model", tiny, "--positions", "f2+l2")
    assert result.exit_code == 0, result.stderr
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["positions"]) == (str(tiny), "f2+l2")
    assert "--positions" not in result.stdout and "--model" not in result.stdout


def test_another_base_model_is_refused(cli: Callable[..., Any], other_base: Path, tmp_path: Path) -> None:
    result = cli("import-pyreft", GOLDEN / "loreft", "--output", tmp_path / "out", "--model", other_base)
    assert result.exit_code == 2
    assert "edits states of width 16, and" in result.stderr and "has 24" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_pyrefts_is_refused(cli: Callable[..., Any], tmp_path: Path) -> None:
    result = cli("import-pyreft", tmp_path, "--output", tmp_path / "out")
    assert result.exit_code == 2
    assert "no config.json of pyreft" in result.stderr
