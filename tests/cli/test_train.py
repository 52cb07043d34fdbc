from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from reftune.models import public_name


def test_the_output_folder_holds_what_was_promised(trained: Path) -> None:
    names = {path.name for path in trained.iterdir()}
    promised = {"adapter_config.json", "adapter_model.safetensors", "metrics.json", "loss.png", "run.yaml", "README.md"}
    assert promised <= names
    assert not [name for name in names if name.startswith(".")], "something unfinished was left behind"
    metrics = json.loads((trained / "metrics.json").read_text())
    assert {
        "train_loss", "eval_loss", "epoch_seconds", "tokens_per_second", "trainable_parameters", "peak_memory_bytes",
        "prefix_reuse",
    } <= set(metrics)  # fmt: skip
    assert len(metrics["epoch_seconds"]) == 2
    assert metrics["trainable_parameters"] == 2 * 16 * 2 + 2
    assert metrics["eval_loss"] > 0
    assert (trained / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_card_s_code_answers_its_prompt(trained: Path, rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, front, text = (trained / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "peft"
    assert text.startswith("\n# A ReFT adapter of tiny\n")
    code, shown = text.split("```python\n")[1].split("```")[0], text.split("```text\n")[1].split("\n```")[0]
    assert code.startswith("import reftune\n")
    exec(code.replace("this-folder", str(trained)), {})
    assert capsys.readouterr().out.startswith(shown)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("org/model", "org/model"),
        (str(Path(__file__)), "test_train.py"),
    ],
)
def test_a_card_names_the_base_as_the_hub_does(name: str, shown: str) -> None:
    assert public_name(name) == shown


def test_run_yaml_trains_the_same_adapter_again(trained: Path, cli, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)  # its paths do not depend on the working folder
    result = cli("train", trained / "run.yaml", "--output", tmp_path / "again")
    assert result.exit_code == 0, result.output
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (trained, tmp_path / "again"))
    assert first.keys() == second.keys()
    assert all((first[name] == second[name]).all() for name in first)


def test_flags_win_over_the_recipe(tiny: Path, rows: Path, cli, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"train_file: {rows}\nmodel: {tiny}\nrank: 2\nlayers: [0, 1]\nepochs: 1\nlr: 1e-3\n"
        "tensorboard: false\ndevice: cpu\n"
    )
    result = cli("train", recipe, "--rank", 3, "--limit-rows", 4, "--no-share-weights", "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    resolved = yaml.safe_load((tmp_path / "out" / "run.yaml").read_text())
    assert (resolved["rank"], resolved["layers"], resolved["lr"]) == (3, [0, 1], 0.001)
    assert resolved["share_weights"] is False and resolved["limit_rows"] == 4


def test_a_finished_run_goes_on_with_more_epochs(trained: Path, cli, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "more"
    shutil.copytree(trained, folder)
    result = cli("train", trained / "run.yaml", "--output", folder, "--epochs", 3, "--resume")
    assert result.exit_code == 0, result.output
    assert json.loads((folder / "metrics.json").read_text())["steps"] == 9


def test_a_run_that_is_to_go_on_to_less_than_it_has_is_refused(trained: Path, cli, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "less"
    shutil.copytree(trained, folder)
    for flags, words in ((["--epochs", 1], "epochs=1"), (["--max-steps", 5], "max_steps=5")):
        result = cli("train", trained / "run.yaml", "--output", folder, "--resume", *flags)
        assert result.exit_code == 2 and "checkpoint-6 has 6 steps behind it (epoch 2)" in result.stderr
        assert f"{words} asks for fewer" in result.stderr
    assert (folder / "adapter_model.safetensors").read_bytes() == (trained / "adapter_model.safetensors").read_bytes()


def test_that_nothing_is_left_to_train_is_told(trained: Path, cli, tmp_path: Path, caplog) -> None:
    import logging
    import shutil

    folder = tmp_path / "same"
    shutil.copytree(trained, folder)
    logging.getLogger("reftune").addHandler(caplog.handler)
    try:
        assert cli("train", trained / "run.yaml", "--output", folder, "--resume").exit_code == 0
    finally:
        logging.getLogger("reftune").removeHandler(caplog.handler)
    assert "Nothing is left to train: checkpoint-6 has all the steps of epochs=2 behind it." in caplog.messages


def test_an_unfinished_run_is_not_trampled_on(trained: Path, cli, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "unfinished"
    shutil.copytree(trained, folder)
    (folder / "metrics.json").unlink()
    refused = cli("train", trained / "run.yaml", "--output", folder)
    assert refused.exit_code == 2 and "--resume" in refused.stderr
    assert cli("train", trained / "run.yaml", "--output", folder, "--overwrite").exit_code == 0


def test_show_prints_the_first_rows_with_their_edited_tokens(tiny: Path, rows: Path, cli, tmp_path: Path) -> None:
    result = cli(
        "train", "--train-file", rows, "--model", tiny, "--layers", 0, "--epochs", 1, "--limit-rows", 2, "--show", 2,
        "--no-tensorboard", "--device", "cpu", "--output", tmp_path / "out",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "example 1" in result.stderr and "example 2" in result.stderr


def test_progress_is_told_on_standard_error(tiny: Path, rows: Path, cli, tmp_path: Path) -> None:
    result = cli(
        "train", "--train-file", rows, "--model", tiny, "--layers", 0, "--epochs", 2, "--log-every", 1, "--batch-size", 4,
        "--eval-fraction", 0.25, "--no-tensorboard", "--device", "cpu", "--output", tmp_path / "out",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "step 6/6" in result.stderr and "tokens/s" in result.stderr and "eval loss" in result.stderr
    assert "tokens/s" not in result.stdout


def test_steps_say_when_to_evaluate_to_save_and_to_stop(tiny: Path, rows: Path, cli, tmp_path: Path) -> None:
    flags = [
        "train", "--train-file", rows, "--model", tiny, "--layers", 0, "--batch-size", 3, "--eval-fraction", 0.25,
        "--no-tensorboard", "--device", "cpu", "--output", tmp_path / "out", "--eval-steps", 2, "--save-steps", 4,
        "--save-total-limit", 1,
    ]  # fmt: skip
    result = cli(*flags, "--max-steps", 5)
    assert result.exit_code == 0, result.output
    (last,) = (path for path in (tmp_path / "out").glob("checkpoint-*") if path.name != "checkpoint-4")
    history = json.loads((last / "trainer_state.json").read_text())["log_history"]
    assert last.name == "checkpoint-5" and [entry["step"] for entry in history if "eval_loss" in entry] == [2, 4, 5]
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["steps"] == 5
    assert cli(*flags, "--max-steps", 7, "--resume").exit_code == 0
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["steps"] == 7


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--eval-steps", 2], "--eval-steps=2 goes by the held-out loss"),
        (
            ["--eval-fraction", 0.25, "--eval-steps", 4, "--save-steps", 6],
            "--save-steps=6: .*a multiple of eval_steps=4",
        ),
        (["--max-steps", 0], "--max-steps=0: must be at least 1"),
        (["--report-to", "mlflow"], "--report-to='mlflow': choose of tensorboard, trackio, wandb, none"),
        (["--report-to", "tensorboard,trackio", "--device", "cpu"], "report_to='trackio': it is not installed"),
    ],
)
def test_steps_and_loggers_that_cannot_be_are_one_error(
    flags: list[Any], message: str, tiny: Path, rows: Path, cli, tmp_path: Path
) -> None:
    result = cli("train", "--train-file", rows, "--model", tiny, "--output", tmp_path / "out", *flags)
    assert result.exit_code == 2 and re.search(message, result.stderr), result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("objective", ["reps", "reft-r1"])
def test_pairs_train_an_adapter_that_prefers_the_positive_answers(
    cli: Any, tiny: Path, tmp_path: Path, objective: str
) -> None:
    pairs = tmp_path / "pairs.csv"
    lines = [f"say {n},arr matey,it is {n}" for n in range(8)]
    pairs.write_text("\n".join(["prompt,good,bad", *lines]) + "\n")
    out = tmp_path / "out"
    flags = [
        "train", "--train-file", pairs, "--columns", "positive=good,negative=bad", "--model", tiny, "--objective",
        objective, "--method", "lobireft", "--rank", 1, "--layers", 1, "--positions", "all", "--epochs", 3, "--lr",
        0.05, "--eval-fraction", 0.25, "--output", out, "--no-tensorboard", "--device", "cpu",
    ]  # fmt: skip
    result = cli(*flags)
    assert result.exit_code == 0, result.output
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["eval_loss"] > 0 and metrics["train_rows"] == 6
    assert yaml.safe_load((out / "run.yaml").read_text())["objective"] == objective
    changed = cli(*flags, "--resume", "--objective", "completion", "--columns", "completion=good")
    assert changed.exit_code == 2 and "objective=" in changed.stderr
    assert cli("generate", out, "--prompt", "say 3", "--max-new-tokens", 4, "--device", "cpu").exit_code == 0


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--objective", "reps"], "positive"),
        (["--objective", "reps", "--train-file", "demo"], "positive"),
        (["--objective", "reps", "--gradient-checkpointing"], "gradient_checkpointing"),
        (["--objective", "reps", "--task", "classification"], "task='classification'"),
        (["--objective", "reps", "--factors", "1,-2"], "above 0"),
        (["--factors", "2"], "objective='reps' alone"),
        (["--objective", "reft-r1", "--layers", "1"], "one vector"),
        (["--objective", "reft-r1", "--method", "lobireft", "--rank", "1"], "one vector"),
        (["--objective", "ppo"], "objective"),
    ],
    ids=str,
)
def test_an_objective_that_cannot_be_is_one_error(
    cli: Any, tiny: Path, rows: Path, tmp_path: Path, flags: list[str], said: str
) -> None:
    result = cli(
        "train", "--train-file", rows, "--model", tiny, "--output", tmp_path / "out", "--device", "cpu", *flags
    )
    assert result.exit_code == 2 and said in result.stderr and "Traceback" not in result.output
    assert not (tmp_path / "out").exists()
