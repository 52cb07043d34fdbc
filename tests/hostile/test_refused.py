"""What strangers write: each ends in exit status 2 with one message, no traceback, and nothing written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

_NO_NUMBERS = ["inf", "-inf", "nan", "-1", "1e400", "9" * 5000, "1e13", "four", "[1]", "-0.5"]
_FLAGS = [
    "rank", "batch-size", "gradient-accumulation", "limit-rows", "log-every", "seed", "warmup-steps", "weight-decay",
    "max-grad-norm", "max-length", "epochs", "lr", "dropout", "warmup-ratio", "eval-fraction",
]  # fmt: skip
NUMBERS = [(flag, value) for flag in _FLAGS for value in _NO_NUMBERS]
WRITING = [
    (flag, value)
    for flag in ("temperature", "top-p", "repetition-penalty", "seed", "max-new-tokens", "batch-size")
    for value in ("inf", "nan", "-1", "1e400")
]
RECIPES = {
    "deep JSON": "[" * 100_000,
    "deep YAML": "a: " + "{b: " * 5000,
    "alias bomb": "a0: &a0 [x,x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)),
    "contains itself": "train_file: &a [*a]\n",
    "a date that is none": "seed: 2024-13-45\n",
    "a long integer": "seed: " + "9" * 10_000 + "\n",
    "a list": "- a\n- b\n",
    "bytes": "\udcff\udcfe",
    "a control character": "train_file: \x1b[31m\n",
    "an unknown key": "lerning_rate: 1\n",
    "a mapping as text": "model: {a: 1}\n",
    "no name of an output": "train_file: demo\noutput: ' '\n",
}


def refused(result: Any, folder: Path, before: set[str]) -> str:
    assert result.exit_code == 2, result.output[-500:] + repr(result.exception)
    assert "Traceback" not in result.output and "\x1b[31m" not in result.output
    message = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(message) == 1 and len(result.stderr) < 6000
    assert {str(path) for path in folder.rglob("*")} == before
    return message[0]


def held(folder: Path) -> set[str]:
    return {str(path) for path in folder.rglob("*")}


@pytest.mark.parametrize(("flag", "value"), NUMBERS)
def test_a_number_out_of_bounds_is_named_by_its_flag(
    flag: str, value: str, cli: Any, rows: Path, tmp_path: Path
) -> None:
    result = cli("train", "--train-file", rows, f"--{flag}={value}", "--output", tmp_path / "out")
    assert f"--{flag}=" in refused(result, tmp_path, set())


@pytest.mark.parametrize(("flag", "value"), WRITING)
def test_a_number_of_writing_out_of_bounds(flag: str, value: str, cli: Any, tmp_path: Path) -> None:
    refused(cli("generate", tmp_path, "--prompt", "hi", f"--{flag}={value}"), tmp_path, set())


@pytest.mark.parametrize("command", ["train", "compare", "sweep"])
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_that_cannot_be_read(name: str, command: str, cli: Any, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_bytes(RECIPES[name].encode("utf-8", "surrogateescape"))
    refused(cli(command, recipe), tmp_path, held(tmp_path))


@pytest.mark.parametrize("kind", ["file", "link", "dangling", "pipe", "device", "foreign", "model"])
def test_an_output_that_is_not_ours_to_write(kind: str, cli: Any, rows: Path, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
    elif kind in ("link", "dangling"):
        out.symlink_to(tmp_path / "there")
        if kind == "link":
            (tmp_path / "there").mkdir()
    elif kind == "pipe":
        os.mkfifo(out)
    elif kind == "foreign":
        out.mkdir()
        (out / "thesis.txt").write_text("mine")
    out = {"device": Path(os.devnull), "model": tiny}.get(kind, out)
    refused(
        cli("train", "--train-file", rows, "--model", tiny, "--output", out, "--overwrite"), tmp_path, held(tmp_path)
    )
