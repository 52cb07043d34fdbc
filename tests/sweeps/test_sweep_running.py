"""Sweeps on a tiny model: resumable, pruned, reproducible, and with one prefix store."""

from __future__ import annotations

import csv
import io
import json
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

import reftune
from reftune.cli import app
from reftune.errors import ReftuneError
from reftune.inference.loading import load_edited
from reftune.runs import run_training
from reftune.runs.recipe import resolve_recipe
from reftune.sweeps import SweepInterrupted, resolve_sweep, run_sweep
from reftune.sweeps.trial_runs import TrialRunner
from tests.cli.tiny_folder import save_tiny_model, write_rows

SEARCH: dict[str, Any] = {"rank": [1, 2], "layers": [1, "all"], "lr": {"low": 1e-4, "high": 1e-1, "log": True}}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def recipe(tmp_path: Path, tiny: Path) -> Path:
    """A sweep of four trials, one after the other written into `out`."""
    return written(tmp_path, tiny)


def written(folder: Path, tiny: Path, **changes: Any) -> Path:
    rows, held_out = write_rows(folder / "rows.csv"), write_rows(folder / "held_out.csv", 3)
    values = {
        "train_file": str(rows), "eval_file": str(held_out), "model": str(tiny), "device": "cpu", "epochs": 2,
        "batch_size": 4, "method": "loreft", "positions": "l1", "seed": 3, "output": str(folder / "out"), "trials": 4, "search": SEARCH,
    }  # fmt: skip
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump({**values, **changes}))
    return path


def swept(path: Path, more: int | None = None, **flags: Any):
    return run_sweep(resolve_sweep(path, flags), more=more)


def table(folder: Path) -> list[dict[str, str]]:
    with open(folder / "trials.csv", newline="") as file:
        return list(csv.DictReader(file))


def break_off_in_trial(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Ctrl-C in the middle of the training of a trial, counted from 0."""
    trained, begun = TrialRunner.trained, []

    def breaking(self: TrialRunner, recipe: Any, watch: Any) -> Any:
        begun.append(recipe)
        if len(begun) == number + 1:
            step = watch._on_step

            def interrupt(done: int, total: int) -> None:
                step(done, total)
                if done == 4:
                    raise KeyboardInterrupt

            watch._on_step = interrupt
        return trained(self, recipe, watch)

    monkeypatch.setattr(TrialRunner, "trained", breaking)


def test_a_sweep_leaves_what_was_promised_and_its_best_recipe_trains_to_the_same_loss(recipe: Path, tmp_path: Path):
    result = swept(recipe)
    folder = tmp_path / "out"
    assert [trial.state for trial in result.trials] == ["complete"] * 4 and result.best is not None
    assert {path.name for path in folder.iterdir()} == {
        "study.jsonl", "trials.csv", "best.yaml", "best", "SWEEP.md", "history.png", "importance.json", "importance.png"
    }  # fmt: skip
    losses = [float(row["eval_loss"]) for row in table(folder)]
    assert min(losses) == result.best.value and len(set(losses)) == 4
    shares = json.loads((folder / "importance.json").read_text())["importance"]
    assert shares.keys() == SEARCH.keys() and sum(shares.values()) == pytest.approx(1)
    assert f"**{result.best.value:.4f}**" in (folder / "SWEEP.md").read_text()

    kept = json.loads((folder / "best" / "metrics.json").read_text())
    assert (kept["trial"], kept["eval_loss"]) == (result.best.number, result.best.value)
    again = run_training(resolve_recipe(folder / "best.yaml", {"output": str(tmp_path / "again")}))
    assert again.metrics["eval_loss"] == pytest.approx(result.best.value, abs=1e-5)
    assert load_edited(folder / "best", device="cpu").folder == folder / "best"


def test_trials_share_what_prefix_reuse_computed(recipe: Path, tmp_path: Path):
    swept(recipe)
    seen: set[str] = set()
    for row in table(tmp_path / "out"):
        assert row["prefix_reuse"] == "on" and int(row["prefix_hits"]) > 0
        assert (int(row["prefix_misses"]) == 0) == (row["layers"] in seen), (
            "computed by the first trial of a layer alone"
        )
        seen.add(row["layers"])
    assert seen


def test_an_interrupted_sweep_goes_on_and_ends_with_the_same_trials(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as patch:
        break_off_in_trial(patch, 1)
        with pytest.raises(SweepInterrupted, match="1 trial. Go on with the same command: reftune sweep"):
            swept(recipe)
    assert len(table(tmp_path / "out")) == 1 and (tmp_path / "out" / "best.yaml").is_file()
    first = table(tmp_path / "out")[0]
    result = swept(recipe)
    assert len(result.trials) == 4 and all(trial.state == "complete" for trial in result.trials)
    rows = table(tmp_path / "out")
    assert rows[0] == first, "what was saved is not trained again"
    assert len({(row["rank"], row["layers"], row["lr"]) for row in rows}) == 4
    assert len(swept(recipe).trials) == 4, "a finished sweep has nothing more to do"
    assert len(swept(recipe, more=1).trials) == 5


def test_another_recipe_in_the_same_folder_is_refused_until_it_is_overwritten(recipe: Path, tmp_path: Path, tiny: Path):
    swept(recipe, trials=1)
    with pytest.raises(reftune.ReftuneError, match="holds a sweep with batch_size=4, and this one has 2"):
        swept(recipe, batch_size=2)
    with pytest.raises(reftune.ReftuneError, match="holds a sweep with search="):
        swept(written(tmp_path, tiny, search={"rank": [1, 2]}))
    (tmp_path / "rows.csv").write_text("prompt,completion\nother,rows\n")
    with pytest.raises(reftune.ReftuneError, match="holds a sweep with"):
        swept(recipe)
    assert len(swept(recipe, trials=1, overwrite=True).trials) == 1


def test_a_sweep_goes_on_after_an_upgrade_that_brought_a_setting(recipe: Path, tmp_path: Path):
    swept(recipe, trials=1)
    journal = tmp_path / "out" / "study.jsonl"
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    identity = next(line["user_attr"]["identity"] for line in lines if "identity" in line.get("user_attr", {}))
    assert identity.pop("parametrization") == "cholesky"
    journal.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(reftune.ReftuneError, match="with parametrization='cholesky', and this one has 'householder'"):
        swept(recipe, parametrization="householder")
    assert len(swept(recipe, trials=2).trials) == 2


def test_bad_trials_are_stopped_early(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch):
    in_order = [{"lr": lr} for lr in (1e-2, 2e-2, 3e-2, 4e-2, 1e-9, 2e-9)]  # the bad ones last
    monkeypatch.setattr("reftune.sweeps.study.draw_distinct", lambda *args: in_order)
    path = written(tmp_path, tiny, search={"lr": [1e-2, 2e-2, 3e-2, 4e-2, 1e-9, 2e-9]}, epochs=3, trials=6)
    result = swept(path, sampler="random")
    assert [trial.state for trial in result.trials] == ["complete"] * 4 + ["pruned"] * 2
    assert [len(trial.epochs) for trial in result.trials] == [3] * 4 + [1] * 2
    unpruned = swept(path, sampler="random", pruner="none", overwrite=True)
    assert all(trial.state == "complete" for trial in unpruned.trials)


def test_a_small_space_is_searched_once_and_ends_there(tmp_path: Path, tiny: Path):
    result = swept(written(tmp_path, tiny, search={"rank": [1, 2]}, trials=9, epochs=1))
    assert sorted(trial.settings["rank"] for trial in result.trials) == [1, 2]


def test_a_choice_that_the_model_does_not_have_is_told_before_any_training(tmp_path: Path, tiny: Path):
    with pytest.raises(reftune.ReftuneError, match=r"search.layers: \[0, 7\]: .*2 layers"):
        swept(written(tmp_path, tiny, search={"layers": ["all", [0, 7]]}))
    assert not (tmp_path / "out").exists()


def test_time_that_is_up_ends_the_sweep(recipe: Path):
    assert len(swept(recipe, timeout=1e-9).trials) == 0


def test_the_command_line_tells_each_trial_and_the_best(recipe: Path, tmp_path: Path):
    result = CliRunner().invoke(app, ["sweep", str(recipe), "--trials", "2", "--epochs", "1"])
    assert result.exit_code == 0, result.output
    assert "The best of 2 trials" in result.stdout and "reftune chat" in result.stdout
    assert result.stderr.count("best ") == 2 and "rank=" in result.stderr
    missing = CliRunner().invoke(app, ["sweep", str(tmp_path / "none.yaml")])
    assert missing.exit_code == 2 and "there is no such file" in missing.stderr
    help_text = CliRunner().invoke(app, ["sweep", "--help"], env={"COLUMNS": "200"}).stdout
    assert "--trials" in help_text and "default: 30" in help_text and "--more" in help_text and "MINUTES" in help_text


def test_half_a_last_line_of_the_journal_is_passed_over(
    recipe: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    swept(recipe, trials=2)
    journal = tmp_path / "out" / "study.jsonl"
    journal.write_bytes(journal.read_bytes()[:-20])
    result = swept(recipe, trials=3)
    assert len(result.trials) == 3 and "its last line is cut off" in caplog.text
    assert all(json.loads(line) for line in journal.read_text().splitlines())


def test_a_journal_that_ends_in_something_else_is_refused_and_left(recipe: Path, tmp_path: Path) -> None:
    swept(recipe, trials=2)
    journal = tmp_path / "out" / "study.jsonl"
    journal.write_bytes(content := journal.read_bytes() + b"notes")
    with pytest.raises(reftune.ReftuneError, match="study.jsonl is damaged"):
        swept(recipe, trials=3)
    assert journal.read_bytes() == content


GRID = {"trials": 10, "search": {"rank": [1, 2], "lr": [0.001, 0.01]}, "pruner": "none"}


def test_two_jobs_try_every_combination_once_with_the_losses_of_one(tmp_path: Path, tiny: Path):
    path = written(tmp_path, tiny, **GRID)
    alone = swept(path)
    with io.StringIO() as told:
        apart = run_sweep(resolve_sweep(path, {"output": str(tmp_path / "apart")}), console=Console(file=told), jobs=2)
        assert told.getvalue().count("every combination was tried") == 1
    losses = [{tuple(trial.settings.items()): trial.value for trial in found.trials} for found in (alone, apart)]
    assert len(losses[1]) == len(apart.trials) == 4 and losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert apart.best is not None and apart.best.value == min(losses[1].values())
    metrics = json.loads((tmp_path / "apart" / "best" / "metrics.json").read_text())
    assert (metrics["trial"], metrics["eval_loss"]) == (apart.best.number, apart.best.value)
    assert not (tmp_path / "apart" / "trials").exists()


def test_a_sweep_of_which_a_job_was_killed_goes_on(tmp_path: Path, tiny: Path):
    path = written(tmp_path, tiny, **GRID, epochs=30)
    folder = tmp_path / "out"

    def kill_one() -> None:
        while not any(folder.glob("trials/00*")):  # a trial is being trained
            time.sleep(0.05)
        jobs = [child for child in psutil.Process().children() if "reftune.sweeps.worker" in child.cmdline()]
        jobs[0].kill()

    killer = threading.Thread(target=kill_one)
    killer.start()
    with pytest.raises(ReftuneError, match="a job ended with status -9"):
        run_sweep(resolve_sweep(path), jobs=2)
    killer.join()
    assert not [child for child in psutil.Process().children() if "reftune.sweeps.worker" in child.cmdline()]
    result = swept(path)
    assert [trial.state for trial in result.trials] == ["complete"] * 4
    assert len({tuple(trial.settings.items()) for trial in result.trials}) == 4
