"""Every mistake named in the plan: exit status 2 or 130, one clear message, no traceback, nothing lost."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from reftune.training.checkpoints import incomplete_reason, last_complete_checkpoint
from tests.cli.tiny_folder import save_tiny_model, write_rows


@pytest.fixture
def train(cli, tiny: Path, rows: Path, tmp_path: Path):
    """`reftune train` with what every run needs; keywords replace or add flags."""

    def run(**changed: Any) -> Any:
        flags: dict[str, Any] = {
            "train_file": rows, "model": tiny, "layers": 1, "epochs": 1, "batch_size": 4, "device": "cpu",
            "output": tmp_path / "out",
        } | changed  # fmt: skip
        parts: list[object] = ["--no-tensorboard"]
        for name, value in flags.items():
            parts += [f"--{name.replace('_', '-')}", value]
        return cli("train", *parts)

    return run


def refused(result: Any, *words: str) -> None:
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.stderr
    message = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(message) == 1, result.stderr
    for word in words:
        assert word in message[0], message[0]


def test_a_missing_file(train, rows: Path) -> None:
    refused(train(train_file=rows.with_name("row.csv")), "row.csv", "did you mean rows.csv")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--learning-rate", "1e-3"), "--lr"),
        (("--num-train-epochs", "1"), "--epochs"),
        (("--method", "lora"), "reftune compare"),
        (("--batch-size", "many"), "batch-size='many'"),
        (("--like", "nobody"), "blog or paper or serving"),
    ],
)
def test_other_libraries_words_are_answered_with_ours(cli, rows: Path, flags: tuple[str, ...], said: str) -> None:
    result = cli("train", "--train-file", rows, *flags)
    assert result.exit_code == 2 and "Traceback" not in result.output
    assert said in result.stderr


def test_layers_and_columns_are_named_as_the_command_line_does(train, tmp_path: Path) -> None:
    refused(train(layers=40), "layers=[40]: this model has 2 layers")
    questions = tmp_path / "qa.csv"
    questions.write_text("question,reply\nwho,me\n")
    refused(train(train_file=questions), "--columns prompt=question,completion=answer")


def test_no_file_at_all(cli) -> None:
    refused(cli("train"), "--train-file")


def test_an_unknown_column(train) -> None:
    refused(train(columns="prompt=promt"), "'promt'", "did you mean 'prompt'")


def test_an_empty_completion(train, tmp_path: Path) -> None:
    file = tmp_path / "empty.csv"
    file.write_text("prompt,completion\nhi,there\nhi,\n")
    refused(train(train_file=file), "row 3", "'completion' is empty")


def test_a_layer_that_does_not_exist(train, tmp_path: Path) -> None:
    refused(train(layers=40), "40", "2 layers")
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_a_position_that_does_not_parse(train) -> None:
    refused(train(positions="x3"), "'x3'", "fN")


def test_a_prompt_longer_than_the_limit(train) -> None:
    refused(train(max_length=20), "rows.csv, row 2", "max_length=20", "truncate")
    assert train(max_length=20, long_prompts="truncate").exit_code == 0


def test_a_prompt_longer_than_the_context_in_generation(cli, trained: Path) -> None:
    refused(cli("generate", trained, "--prompt", "word " * 100), "tokens", "256", "--max-new-tokens")


def test_an_adapter_for_another_base(cli, trained: Path, other_base: Path) -> None:
    refused(cli("generate", trained, "--model", other_base, "--prompt", "hi"), "another base model")


def test_a_folder_without_an_adapter(cli, tmp_path: Path) -> None:
    refused(cli("generate", tmp_path, "--prompt", "hi"), "adapter_config.json")
    refused(cli("info", tmp_path / "nowhere"), "is not a folder")


@pytest.mark.parametrize("command", ["generate", "eval", "info", "chat"])
def test_a_corrupt_safetensors(command: str, cli, trained: Path, rows: Path, tmp_path: Path) -> None:
    folder = tmp_path / "corrupt"
    shutil.copytree(trained, folder)
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    more = {"generate": ["--prompt", "hi"], "eval": ["--test-file", rows], "info": [], "chat": []}[command]
    refused(cli(command, folder, *more), "safetensors")


def test_a_corrupt_checkpoint_is_not_resumed_from(cli, trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(trained, folder)
    for weights in folder.glob("checkpoint-*/adapter_model.safetensors"):
        weights.write_bytes(b"nothing")
    refused(cli("train", trained / "run.yaml", "--output", folder, "--resume"), "no complete checkpoint")


def test_a_full_disk_at_the_end_keeps_the_checkpoints(train, monkeypatch, tmp_path: Path) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("reftune.runs.steps.save_adapter", full)
    result = train(epochs=2)
    refused(result, "the disk is full", "--resume")
    newest = last_complete_checkpoint(tmp_path / "out")
    assert newest is not None and incomplete_reason(newest) is None
    assert not (tmp_path / "out" / "metrics.json").exists()


def test_a_full_disk_for_the_answers(cli, trained: Path, monkeypatch, tmp_path: Path) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("reftune.output.files.write_text", full)
    out = tmp_path / "answers.jsonl"
    refused(cli("generate", trained, "--prompt", "hi", "--max-new-tokens", 2, "--out", out), "the disk is full")
    assert not out.exists()


def test_a_key_that_no_recipe_has(cli, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("train_file: x.csv\nlearning_rate: 1e-3\n")
    refused(cli("train", recipe), "recipe.yaml", "'learning_rate'", "did you mean lr?")


def test_an_output_that_is_a_file(train, rows: Path) -> None:
    refused(train(output=rows), "is a file")


@pytest.mark.parametrize(
    ("flag", "value", "word"),
    [
        ("rank", 0, "at least 1"), ("rank", "four", "'four'"), ("method", "lorefy", "lorefy"), ("lr", -1, "above 0"),
        ("schedule", "zigzag", "linear"), ("dropout", 1.5, "below 1"), ("component", "nowhere", "nowhere"),
        ("rank", 17, "16"), ("template", "no place", "%s"),
    ],
)  # fmt: skip
def test_a_value_out_of_range(train, flag: str, value: object, word: str) -> None:
    refused(train(**{flag: value}), word)


def test_an_unknown_flag(cli) -> None:
    result = cli("train", "--rnak", 4)
    assert result.exit_code == 2 and "--rank" in result.stderr and "Traceback" not in result.stderr


def test_debug_shows_the_traceback(cli, tmp_path: Path) -> None:
    result = cli("--debug", "info", tmp_path / "nowhere")
    assert result.exit_code != 0 and type(result.exception).__name__ == "ReftuneError"


def train_again(recipe: Path) -> subprocess.CompletedProcess[str]:
    """`reftune train` of a recipe in a process of its own."""
    start = [sys.executable, "-W", "ignore", "-c", "from reftune.cli import main; main()"]
    return subprocess.run([*start, "train", str(recipe), "--overwrite"], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"layers": 0}, "layers=1 before, 0 now"),
        ({"positions": "l2"}, "positions='l1' before, 'l2' now"),
        ({"rank": 3}, "rank=2 before, 3 now"),
        ({"seed": 7}, "seed=42 before, 7 now"),
        ({"optimizer": "sgd"}, "optimizer=None before, 'sgd' now"),
        ({"template": "Q: %s"}, "template=None before"),
        ({"train_file": "other rows"}, "other"),
        ({"model": "the same shape with other weights"}, "other"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_resuming_something_else_is_refused(
    cli, trained: Path, tiny: Path, tmp_path: Path, changed: dict[str, Any], words: str
) -> None:
    folder = tmp_path / "out"
    shutil.copytree(trained, folder)
    if changed.get("train_file"):
        changed = {"train_file": write_rows(tmp_path / "rows.csv", 13)}
    elif changed.get("model"):
        shutil.copytree(tiny, tmp_path / "base")
        save_tiny_model(tmp_path / "base", seed=1)
        changed = {"model": tmp_path / "base"}
    flags = [part for name, value in changed.items() for part in (f"--{name.replace('_', '-')}", value)]
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    refused(cli("train", trained / "run.yaml", "--output", folder, "--resume", "--epochs", "3", *flags), words)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_picture_that_cannot_be_drawn_loses_no_run(train, monkeypatch, tmp_path: Path) -> None:
    def broken(*_: Any) -> None:
        raise AttributeError("matplotlib is in pieces")

    monkeypatch.setattr("reftune.training.plots.plot_loss", broken)
    assert train().exit_code == 0
    assert (tmp_path / "out" / "metrics.json").is_file() and not (tmp_path / "out" / "loss.png").exists()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT to send to one process")
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_in_training_save_and_say_how_to_go_on(cli, tiny: Path, tmp_path: Path, stop: int) -> None:
    rows, out = write_rows(tmp_path / "many.csv", 400), tmp_path / "out"
    flags = f"--train-file {rows} --model {tiny} --output {out} --layers 1 --epochs 1000 --batch-size 4 --device cpu"
    start = [sys.executable, "-W", "ignore", "-c", "from reftune.cli import main; main()"]
    command = [*start, "train", *flags.split(), "--no-tensorboard"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 200
        while last_complete_checkpoint(out) is None and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        second = train_again(out / "run.yaml")  # while the first is at it
        process.send_signal(stop)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert second.returncode == 2 and "is being written by another run" in second.stderr
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    newest = last_complete_checkpoint(out)
    assert newest is not None and incomplete_reason(newest) is None
    assert newest in stderr and "--resume" in stderr
    for folder in out.glob("checkpoint-*"):
        assert incomplete_reason(folder) is None
    generated = cli("generate", newest, "--prompt", "hi", "--max-new-tokens", 2)
    assert generated.exit_code == 0, generated.output
    done = int(newest.rpartition("-")[2]) // 100 + 1
    resumed = cli("train", out / "run.yaml", "--resume", "--epochs", done)
    assert resumed.exit_code == 0, resumed.output
    assert (out / "adapter_model.safetensors").is_file()
