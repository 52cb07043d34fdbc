"""`reftune train` in several processes: what one process trains, from a launcher or by itself, with one voice.

Starting two processes is what takes time here: each start is used for all there is to see of it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from reftune.cli import app
from reftune.errors import ReftuneError
from reftune.runs import processes
from reftune.runs.fingerprint import check_resumed
from reftune.runs.output_folder import write_recipe
from reftune.runs.recipe import TrainRecipe
from tests.cli.tiny_folder import save_tiny_model, write_rows
from tests.tiny_classifier import glue_rows, save_tiny_encoder, write_jsonl


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of a run whose held-out rows are no whole number of batches."""
    folder = tmp_path_factory.mktemp("several")
    model, rows = save_tiny_model(folder / "tiny"), write_rows(folder / "rows.csv", 19)
    return [
        "train", "--train-file", str(rows), "--model", str(model), "--layers", "1", "--rank", "2", "--lr", "0.05",
        "--eval-fraction", "0.25", "--dtype", "float64", "--log-every", "1", "--no-tensorboard",
        "--schedule", "constant", "--method", "loreft", "--positions", "l1",
    ]  # fmt: skip


def alone(flags: list[str], output: Path, *others: object) -> None:
    """The same in this process, in which nothing is started."""
    arguments = [*flags, "--batch-size", "4", "--processes", "1", "--output", str(output), *map(str, others)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output


def started(command: list[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.Popen(
        [sys.executable, "-m", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def history(folder: Path) -> list[dict[str, Any]]:
    last = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    return json.loads((last / "trainer_state.json").read_text())["log_history"]


def losses(folder: Path) -> list[float]:
    return [entry[key] for entry in history(folder) for key in ("loss", "eval_loss") if key in entry]


def check_equal(some: Path, other: Path) -> None:
    assert losses(some) == pytest.approx(losses(other), rel=1e-6)
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (some, other))
    assert ours.keys() == theirs.keys() and all((ours[name] - theirs[name]).abs().max() < 1e-6 for name in ours)


def test_a_launchers_processes_train_what_one_does_and_one_goes_on_with_it(flags: list[str], tmp_path: Path) -> None:
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "reftune"]
    run = started([*launcher, *flags, "--batch-size", "2", "--epochs", "2", "--output", str(tmp_path / "two")])
    out, err = run.communicate(timeout=280)
    assert run.returncode == 0, err
    assert out.count("Saved in") == 1 and err.count("step 8/8  eval loss") == 1
    alone(flags, tmp_path / "one", "--epochs", 2)
    check_equal(tmp_path / "two", tmp_path / "one")
    found, expected = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("two", "one"))
    assert found["prefix_reuse"] == expected["prefix_reuse"] == "on"
    assert found["prefix_store"]["entries"] < expected["prefix_store"]["entries"]  # its own rows alone
    assert found["tokens"] == expected["tokens"] and found["steps"] == expected["steps"] == 8
    assert found["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-6)
    assert yaml.safe_load((tmp_path / "two" / "run.yaml").read_text())["processes"] == 2
    for name in ("two", "one"):
        alone(flags, tmp_path / name, "--epochs", 3, "--resume")
    check_equal(tmp_path / "two", tmp_path / "one")


def test_a_classifier_and_a_stream_are_what_one_process_trains(flags: list[str], tmp_path: Path) -> None:
    encoder = save_tiny_encoder(tmp_path / "encoder")
    settings = json.loads((encoder / "config.json").read_text())
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # each process draws its own noise
    (encoder / "config.json").write_text(json.dumps(settings | still))
    train, held = (
        write_jsonl(tmp_path / f"{name}.jsonl", glue_rows("sst2", count))
        for name, count in (("train", 24), ("held", 21))
    )
    stream = write_jsonl(tmp_path / "s.jsonl", [{"prompt": f"say {n}", "completion": f"be {n * 7}"} for n in range(20)])
    shared = ["--lr", "0.02", "--dtype", "float64", "--log-every", "1", "--no-tensorboard", "--device", "cpu"]
    classify = [
        "train", "--task", "classification", "--train-file", train, "--eval-file", held, "--test-file", held, "--model",
        encoder, "--rank", "1", "--epochs", "2", *shared,
    ]  # fmt: skip
    streamed = ["train", "--train-file", stream, "--model", flags[4], "--streaming", "--max-steps", "7", *shared]
    for name, command in (("classified", classify), ("streamed", streamed)):
        command = [str(part) for part in command]
        two, one = tmp_path / f"{name}-2", tmp_path / f"{name}-1"
        run = started(["reftune", *command, "--batch-size", "4", "--processes", "2", "--output", str(two)])
        _, err = run.communicate(timeout=280)
        assert run.returncode == 0, err
        alone(command, one, "--batch-size", 8)
        histories = [losses(folder) for folder in (two, one)]  # 6 of steps and 2 of held-out rows, or 7 of steps
        assert histories[0] == pytest.approx(histories[1], rel=1e-6) and len(histories[0]) in (8, 7)
        found, expected = (json.loads((folder / "metrics.json").read_text()) for folder in (two, one))
        assert found["tokens"] == expected["tokens"] and found["steps"] == expected["steps"]
        if name == "classified":
            for part in ("validation", "test"):
                assert found[part]["score"] == expected[part]["score"] and found[part]["rows"] == 21
                assert found[part]["loss"] == pytest.approx(expected[part]["loss"], rel=1e-6)
            parts = tmp_path / "classified-accumulated"
            alone(command, parts, "--batch-size", 4, "--gradient-accumulation", 2)
            assert losses(parts) == pytest.approx(histories[1], rel=1e-6)


def test_a_killed_process_ends_the_run_which_then_goes_on(flags: list[str], tmp_path: Path) -> None:
    long = [*flags, "--batch-size", "2", "--epochs", "400", "--processes", "2", "--output", str(tmp_path / "two")]
    run = started(["reftune", *long])
    until = time.monotonic() + 200
    while not list((tmp_path / "two").glob("checkpoint-*")):
        assert run.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    (other,) = psutil.Process(run.pid).children()
    other.send_signal(signal.SIGKILL)
    out, err = run.communicate(timeout=60)
    assert run.returncode == 2 and not out and "Traceback" not in err
    assert err.count("Error: ") == 1 and "killed by SIGKILL" in err and "--resume" in err
    assert not other.is_running() or other.status() == psutil.STATUS_ZOMBIE
    done = max(int(path.name.split("-")[1]) for path in (tmp_path / "two").glob("checkpoint-*"))
    alone(flags, tmp_path / "two", "--epochs", done // 4 + 1, "--resume")
    alone(flags, tmp_path / "one", "--epochs", done // 4 + 1)
    check_equal(tmp_path / "two", tmp_path / "one")


def test_others_say_nothing_and_take_what_the_first_has(monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert (processes.rank(), processes.count()) == (1, 2)
    assert processes.as_launched(TrainRecipe(train_file="demo")).processes == 2
    assert processes.device(TrainRecipe(train_file="demo", device="cpu", processes=2)) == "cpu"
    assert processes.from_first("of no run", lambda: 3) == 3  # a run is going on in `together` alone
    result = CliRunner().invoke(app, ["info", str(tmp_path)])
    assert result.exit_code == 2 and "runs in one process" in result.stderr


def test_each_process_computes_on_a_gpu_of_its_own(monkeypatch: Any) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert processes.device(TrainRecipe(train_file="demo", processes=4)) == "cuda:3"
    assert processes.device(TrainRecipe(train_file="demo", processes=4, device="cpu")) == "cpu"
    assert processes.device(TrainRecipe(train_file="demo")) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device": "cuda:1"}, "processes=2 take a device each"),
        ({"objective": "reps"}, "does not go with objective='reps'"),
        ({"adapter_column": "user"}, "processes=2 does not go with adapter_column"),
        ({"processes": 0}, "processes=0: must be at least 1"),
    ],
)
def test_what_several_processes_cannot_do_is_one_error(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ReftuneError, match=message):
        TrainRecipe(**{"train_file": "demo", "processes": 2, **settings})


def test_a_resumed_run_may_have_other_processes_but_not_other_steps(tmp_path: Path) -> None:
    def recipe(**settings: Any) -> TrainRecipe:
        return TrainRecipe(train_file="demo", output=str(tmp_path), **settings)

    write_recipe(recipe(batch_size=2, processes=4), tmp_path)
    check_resumed(recipe(batch_size=4, processes=2), tmp_path, {})
    check_resumed(recipe(batch_size=4, gradient_accumulation=2), tmp_path, {})
    with pytest.raises(ReftuneError, match="processes=4 before, 2 now"):
        check_resumed(recipe(batch_size=2, processes=2), tmp_path, {})
