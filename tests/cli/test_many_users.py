"""`reftune train --adapter-column`: a file of many users' rows becomes a store, and what is refused."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from reftune.serving.user_rows import attach_store
from reftune.users import run as users_run
from reftune.users.cohort import Cohort, SharedPart
from reftune.users.store import UserStore

ROWS = [("ann", "red?", "yes"), ("bob", "one?", "two"), ("ann", "blue?", "no no"), ("cy", "who?", "me, of course"),
        ("ann", "green?", "yes yes"), ("cy", "where?", "here"), ("bob", "three?", "four"), ("cy", "when?", "now")]  # fmt: skip
OPTIONS = ("--layers", "1", "--rank", "2", "--epochs", "2", "--batch-size", "2", "--lr", "0.05", "--device", "cpu")
SHARE = ("--share", "rotation", "--bias-lr", "0.2")


def write(path: Path, rows: Any = ROWS) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["user", "prompt", "completion"])
        writer.writerows(rows)
    return path


@pytest.fixture
def train(cli: Any, tiny: Path, tmp_path: Path) -> Any:
    def run(*more: object, rows: Any = ROWS, out: str = "store", users: bool = True) -> Any:
        file = write(tmp_path / f"{out}.csv", rows)
        column = ("--adapter-column", "user") if users else ("--no-tensorboard",)
        return cli("train", "--train-file", file, "--model", tiny, *OPTIONS, *column, "--output", tmp_path / out, *more)

    return run


def test_each_user_of_a_file_is_as_trained_alone(train: Any, tmp_path: Path) -> None:
    held_out = write(tmp_path / "held.csv", [(user, "what?", "this") for user in ("ann", "bob", "cy")])
    result = train("--eval-file", held_out, "--cohort-tokens", "60")
    assert result.exit_code == 0, result.output
    assert "users 3/3" in result.stderr
    store = UserStore.open(tmp_path / "store")
    assert list(store.names()) == ["ann", "bob", "cy"]
    assert store.verify() == []
    told = {line["user"]: line for line in map(json.loads, (store.path / "users.jsonl").read_text().splitlines())}
    for user in store.names():
        own = write(tmp_path / "own-held.csv", [(user, "what?", "this")])
        result = train("--eval-file", own, rows=[row for row in ROWS if row[0] == user], out=user, users=False)
        assert result.exit_code == 0, result.output
        expected = load_file(tmp_path / user / "adapter_model.safetensors")
        found = store.read(user)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)
        metrics = json.loads((tmp_path / user / "metrics.json").read_text())
        assert told[user]["eval_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-5)
        assert told[user]["train_loss"] == pytest.approx(metrics["train_loss"], rel=1e-4)
        config = json.loads((tmp_path / user / "adapter_config.json").read_text())
        assert store.base == config["base_model_name_or_path"]


def test_a_run_that_was_killed_goes_on_in_the_middle_of_a_cohort(
    train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(users_run, "_EVERY_SECONDS", -1.0)
    steps, step, killed_at = [], Cohort.step, -1

    def counted(self: Cohort) -> Any:
        if len(steps) == killed_at:
            raise KeyboardInterrupt
        steps.append([course.rows.name for course in self.courses])
        return step(self)

    monkeypatch.setattr(Cohort, "step", counted)
    assert train("--cohort-tokens", "1", out="whole").exit_code == 0
    expected, killed_at = list(steps), len(steps) - 1
    steps.clear()
    result = train("--cohort-tokens", "1")
    assert result.exit_code == 130
    assert "--resume" in result.stderr
    assert 0 < len(UserStore.open(tmp_path / "store")) < 3
    killed_at = -1
    assert train("--cohort-tokens", "1", "--resume").exit_code == 0
    whole, resumed = (UserStore.open(tmp_path / name) for name in ("whole", "store"))
    for user in ("ann", "bob", "cy"):
        for name, tensor in whole.read(user).items():
            torch.testing.assert_close(resumed.read(user)[name], tensor, rtol=1e-4, atol=1e-5)
    assert steps == expected  # none of them twice


def test_a_shared_part_that_was_killed_goes_on(train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(users_run, "_EVERY_SECONDS", -1.0)
    steps: list[int] = []
    killed_at: list[int] = []
    for kind in (SharedPart, Cohort):

        def counted(self: Any, step: Any = kind.step) -> Any:
            if len(steps) in killed_at:
                killed_at.remove(len(steps))
                raise KeyboardInterrupt
            steps.append(len(self.courses))
            return step(self)

        monkeypatch.setattr(kind, "step", counted)
    assert train(*SHARE, "--cohort-tokens", "1", out="whole").exit_code == 0
    expected = list(steps)
    assert expected[:8] == [3] * 8 and set(expected[8:]) == {1}
    steps.clear()
    killed_at += [6, len(expected) - 1]
    assert train(*SHARE, "--cohort-tokens", "1").exit_code == 130
    assert not UserStore.open(tmp_path / "store").has_shared
    assert train(*SHARE, "--cohort-tokens", "1", "--resume").exit_code == 130
    assert train(*SHARE, "--cohort-tokens", "1", "--resume").exit_code == 0
    assert steps == expected
    assert not list((tmp_path / "store").glob(".*.pt"))
    whole, resumed = (UserStore.open(tmp_path / name) for name in ("whole", "store"))
    for user in ("ann", "bob", "cy"):
        for name, tensor in whole.read(user).items():
            torch.testing.assert_close(resumed.read(user)[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("more", "rows", "told"),
    [
        ((), [*ROWS, ("../eve", "a?", "b")], "row 10: user '../eve'"),
        ((), [*ROWS, ("", "a?", "b")], "row 10: 'user' is ''"),
        ((), [*ROWS, ("Ann", "a?", "b")], "row 10: user 'Ann' and 'ann' (", ),
        (("--adapter-column", "owner"), ROWS, "row 2: adapter_column='owner' is missing"),
        (("--task", "classification"), ROWS, "task='classification' does not go with adapter_column"),
        (("--optimizer", "sgd"), ROWS, "optimizer='sgd' does not go with adapter_column"),
        (("--method", "loreft", "--parametrization", "householder"), ROWS, "parametrization='householder' does not go"),
        (("--patience", "2"), ROWS, "patience=2 goes by the held-out loss"),
        (("--eval-fraction", "0.5"), [*ROWS, ("dan", "a?", "b")], "user 'dan': eval_fraction=0.5"),
        (("--resume",), ROWS, "holds no store of users"),
        (("--bias-lr", "0.1"), ROWS, "--bias-lr=0.1 is the rate of biases beside a shared part: give share too"),
        (("--share", "all"), ROWS, "--share='all'"),
        (("--share", "rotation", "--method", "gated"), ROWS, "take a linear edit, such as loreft"),
    ],
)  # fmt: skip
def test_what_is_refused_changes_nothing(train: Any, tmp_path: Path, more: Any, rows: Any, told: str) -> None:
    result = train(*more, rows=rows)
    assert result.exit_code == 2, result.output
    assert told in result.stderr
    assert not (tmp_path / "store").exists()


def test_held_out_rows_are_there_for_every_user_and_for_no_other(train: Any, tmp_path: Path) -> None:
    held_out = write(tmp_path / "held.csv", [("ann", "what?", "this"), ("eve", "what?", "this")])
    result = train("--eval-file", held_out)
    assert (result.exit_code, "user 'eve' has no rows to train on" in result.stderr) == (2, True)
    held_out = write(tmp_path / "held.csv", [("ann", "what?", "this")])
    result = train("--eval-file", held_out)
    assert (result.exit_code, "user 'bob' has no held-out rows" in result.stderr) == (2, True)


def test_a_store_is_not_written_over_nor_gone_on_with_on_another_base(
    train: Any, cli: Any, tmp_path: Path, other_base: Path
) -> None:
    assert train().exit_code == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "store").iterdir()}
    for more, told in (
        ((), "holds a store of 3 users"),
        (("--resume", "--model", other_base), "other base model's weights"),
        (("--resume", "--epochs", "3"), "epochs=2.0 before, 3.0 now"),
    ):
        result = train(*more)
        assert (result.exit_code, told in result.stderr) == (2, True), result.stderr
    result = train(users=False)
    assert (result.exit_code, "is a store of users" in result.stderr) == (2, True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "store").iterdir()} == before
    assert train("--overwrite", rows=ROWS[:4]).exit_code == 0
    assert len(UserStore.open(tmp_path / "store")) == 3
    shutil.rmtree(tmp_path / "store")


def test_users_share_all_but_a_bias(train: Any, tmp_path: Path, tiny: Path) -> None:
    result = train(*SHARE)
    assert result.exit_code == 0, result.output
    assert "steps of the shared part 8/8" in result.stderr and "users 3/3" in result.stderr
    store = UserStore.open(tmp_path / "store")
    assert store.verify() == [] and store.names() == ["ann", "bob", "cy"]
    assert store.user_bytes == 2 * 4  # one site, r = 2, float32
    found, shared = [store.read(user) for user in store.names()], store.shared()
    for name, tensor in shared.items():
        assert all(torch.equal(user[name], tensor) for user in found) == (not name.endswith(".bias"))
    base = AutoModelForCausalLM.from_pretrained(tiny)
    inputs = {"input_ids": torch.tensor([[5, 6, 7]] * 2)}
    with attach_store(base, store):
        served = base(**inputs, adapter_names=["ann", "bob"]).logits
    for index, user in enumerate(("ann", "bob")):
        store.export(user, tmp_path / user)
        loaded = PeftModel.from_pretrained(base, tmp_path / user)
        for name, tensor in get_peft_model_state_dict(loaded).items():
            assert torch.equal(tensor, store.read(user)[name])
        torch.testing.assert_close(loaded(**inputs).logits[index], served[index], rtol=1e-5, atol=1e-5)
        base = loaded.unload()
