from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from reftune.cli import app


@pytest.fixture(scope="module")
def recipe(tiny: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    path = folder / "compare.yaml"
    path.write_text(
        f"train_file: {rows}\neval_fraction: 0.25\nmodel: {tiny}\ndevice: cpu\nepochs: 1\nbatch_size: 4\n"
        f"output: {folder / 'out'}\nmethods:\n  LoReFT: {{method: loreft, layers: 1, rank: 2}}\n"
        "  LoRA: {method: lora, rank: 2, target_modules: [q_proj]}\n"
    )
    result = CliRunner().invoke(app, ["compare", str(path), "--in-process"])
    assert result.exit_code == 0, result.output
    assert "LoReFT" in result.stdout and "report.html" in result.stdout
    assert "1/2" in result.stderr and "2/2" in result.stderr
    return path


def test_the_report_is_written_again_without_running(cli, recipe: Path) -> None:
    page = recipe.parent / "out" / "report.html"
    page.unlink()
    result = cli("compare", recipe.parent / "out", "--report-only")
    assert result.exit_code == 0, result.output
    assert page.is_file() and "1/2" not in result.stderr
    table, _, rest = result.stdout.partition("In the report, for want of room here: ")
    assert max(map(len, table.splitlines())) <= 80 and "\N{HORIZONTAL ELLIPSIS}" not in table
    assert "too few rows, one seed" in table and "Training" in rest


def test_only_a_named_method_runs(cli, recipe: Path, tmp_path: Path) -> None:
    result = cli("compare", recipe, "--in-process", "--only", "LoRA", "--output", tmp_path, "--seeds", "4")
    assert result.exit_code == 0, result.output
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["LoRA"]
    assert (tmp_path / "runs" / "LoRA" / "seed4" / "result.json").is_file()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--only", "LoRa"), "did you mean LoRA"),
        (("--seeds", "one"), "whole numbers"),
        (("--train-file", "nowhere.csv"), "nowhere.csv"),
        (("--in-process", "--jobs", "2"), "processes of their own"),
        (("--model", "/nowhere"), "there is no such folder"),
    ],
)
def test_a_wrong_flag_is_one_message(cli, recipe: Path, tmp_path: Path, flags: tuple[str, ...], said: str) -> None:
    result = cli("compare", recipe, "--output", tmp_path / "out", *flags)
    assert result.exit_code == 2
    assert said in result.stderr and "Traceback" not in result.output


def test_help_names_units_and_defaults(cli) -> None:
    result = cli("compare", "--help")
    assert result.exit_code == 0
    assert "--report-only" in result.stdout and "[default: 1; x>=1]" in result.stdout


def test_flags_add_the_rivals_that_train_nothing(cli, recipe: Path, tmp_path: Path) -> None:
    flags = ("--system-prompt", "Ye be a pirate.", "--few-shot", "1", "--only", "prompted", "--only", "few-shot")
    result = cli("compare", recipe, "--in-process", "--output", tmp_path / "out", *flags)
    assert result.exit_code == 0, result.output
    assert {path.name for path in (tmp_path / "out" / "runs").iterdir()} == {"prompted", "few-shot"}
    again = cli("compare", tmp_path / "out", "--report-only")  # the folder's recipe has them
    assert again.exit_code == 0 and "prompted" in again.stdout and "few-shot" in again.stdout
    refused = cli("compare", recipe, "--output", tmp_path / "out", "--few-shot", "none")
    assert refused.exit_code == 2 and "examples='none'" in refused.stderr
