"""What strangers write: each ends in exit status 2 with one message, no traceback, and nothing written."""

from __future__ import annotations

import os
import shutil
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


@pytest.mark.parametrize("name", ["dang", "dang.csv", "folder/rows.csv"])
def test_a_link_to_nowhere_is_told_as_one(name: str, cli: Any, tiny: Path, tmp_path: Path) -> None:
    link = tmp_path / name.split("/")[0]
    link.symlink_to(tmp_path / "gone")
    result = cli("train", "--train-file", tmp_path / name, "--model", tiny, "--output", tmp_path / "out")
    refused(result, tmp_path, held(tmp_path))
    assert f"{link} is a link to {tmp_path / 'gone'}, where nothing is" in result.stderr


@pytest.mark.parametrize("command", ["train", "model", "generate"])
def test_other_inputs_that_are_links_to_nowhere(command: str, cli: Any, rows: Path, tmp_path: Path) -> None:
    link = tmp_path / "dang"
    link.symlink_to(tmp_path / "gone")
    given = {
        "train": ["train", link],
        "model": ["train", "--train-file", rows, "--model", link, "--output", tmp_path / "out"],
        "generate": ["generate", link, "--prompt", "hi"],
    }
    result = cli(*given[command])
    refused(result, tmp_path, {str(link)})
    assert "where nothing is" in result.stderr


@pytest.mark.parametrize("name", ["checkpoint-999/x", "checkpoint-{n}/keep.txt", "runs/notes.txt"])
def test_a_run_does_not_remove_what_no_run_wrote(name: str, cli: Any, trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(trained, out)
    newest = max(int(path.name.split("-")[1]) for path in out.glob("checkpoint-*"))
    mine = out / name.format(n=newest)
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine")
    before = sorted(path for path in out.rglob("*"))
    result = cli("train", out / "run.yaml", "--output", out)
    assert result.exit_code == 2 and str(mine.relative_to(out)) in result.stderr, result.output
    assert sorted(path for path in out.rglob("*")) == before and mine.read_text() == "mine"
    mine.unlink()
    assert cli("train", out / "run.yaml", "--output", out).exit_code == 0


@pytest.mark.parametrize("command", ["generate", "eval"])
@pytest.mark.parametrize(
    "line",
    [
        "template: 5", "template: true", "template: [x]", "template: {a: b}", "template: nowhere", "system_prompt: [x]",
        "system_prompt: true", "dtype: [x]", "quantization: 3bit", "chat_template_kwargs: 5", "columns: true",
    ],
)  # fmt: skip
def test_a_recorded_value_of_the_wrong_type(
    line: str, command: str, cli: Any, trained: Path, rows: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(trained / name, out / name)
    (out / "run.yaml").write_text(line + "\n")
    rest = ["--prompt", "hi"] if command == "generate" else ["--test-file", rows]
    result = cli(command, out, *rest)
    refused(result, tmp_path, held(tmp_path))
    assert f"{out / 'run.yaml'}: {line.split(':')[0]}=" in result.stderr, result.stderr
