"""`reftune train --adapter-column`: a file of many users' rows becomes a store, and what is refused."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import reftune
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


KILLED = """
import os, signal, sys
from reftune.users import run
from reftune.users.cohort import Cohort, SharedPart
from reftune.cli import main

run._EVERY_SECONDS, left = -1.0, int(sys.argv.pop(1))
for kind in (SharedPart, Cohort):
    def step(self, step=kind.step):
        global left
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        return step(self)
    kind.step = step
main()
"""


@pytest.mark.parametrize(("killed_at", "in_the_store"), [(6, None), (13, 1)])
def test_a_run_that_is_killed_hard_goes_on_from_its_last_step(
    train: Any, tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, killed_at: int, in_the_store: int | None
) -> None:
    steps: list[tuple[str, int]] = []
    for kind in (SharedPart, Cohort):

        def counted(self: Any, step: Any = kind.step) -> Any:
            course = self.course if isinstance(self, SharedPart) else self.courses[0]
            steps.append((course.rows.name, course.done))
            return step(self)

        monkeypatch.setattr(kind, "step", counted)
    settings = (*SHARE, "--cohort-tokens", "1")
    assert train(*settings, out="whole").exit_code == 0
    expected = list(steps)
    assert [name for name, _ in expected] == [""] * 8 + ["ann"] * 4 + ["cy"] * 4 + ["bob"] * 2
    steps.clear()
    command = ["train", "--train-file", tmp_path / "whole.csv", "--model", tiny, *OPTIONS, "--adapter-column", "user"]
    command = [sys.executable, "-c", KILLED, killed_at, *command, *settings, "--output", tmp_path / "store"]
    environment = {**os.environ, "PYTHONPATH": str(Path(reftune.__file__).parents[1])}
    killed = subprocess.run([str(part) for part in command], env=environment, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    store = UserStore.open(tmp_path / "store")
    assert (len(store) if store.has_shared else None) == in_the_store
    assert train(*settings, "--resume").exit_code == 0
    assert steps == expected[killed_at:]
    assert not list(store.path.glob(".*.pt"))
    whole = UserStore.open(tmp_path / "whole")
    for user in ("ann", "bob", "cy"):
        for name, tensor in whole.read(user).items():
            torch.testing.assert_close(store.read(user)[name], tensor, rtol=1e-4, atol=1e-5)


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
    assert result.stderr.startswith("Training ") and "3 users, 8 rows; 0 rows held out\n" in result.stderr
    assert "that all share, but for each user's bias; learning rate" in result.stderr
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


@pytest.fixture
def adapt(cli: Any, tmp_path: Path) -> Any:
    def run(user: str, *more: object, file: object = None) -> Any:
        return cli("adapt", tmp_path / "store", "--user", user, "--train-file", file or tmp_path / "store.csv", *more)

    return run


def test_a_user_who_comes_later_gets_the_bias_of_training_with_the_others(
    train: Any, adapt: Any, tmp_path: Path
) -> None:
    assert train(*SHARE).exit_code == 0
    store = UserStore.open(tmp_path / "store")
    before = {user: store.read(user) for user in store.names()}
    own = tmp_path / "dora.csv"  # no column of users: all rows are hers
    own.write_text("prompt,completion\n" + "".join(f'{p},"{c}"\n' for user, p, c in ROWS if user == "cy"))
    for user, file in (("cy", None), ("dora", own)):
        result = adapt(user, file=file)
        assert result.exit_code == 0, result.output
        assert "steps 4/4" in result.stderr and f"{user}: 3 rows, 4 steps, training loss" in result.stdout
        for name, tensor in store.read(user).items():
            torch.testing.assert_close(tensor, before["cy"][name], rtol=1e-4, atol=1e-6)
    assert store.names() == ["ann", "bob", "cy", "dora"] and store.verify() == []
    assert all(torch.equal(store.read("ann")[name], tensor) for name, tensor in before["ann"].items())
    assert [json.loads(line)["user"] for line in (store.path / "users.jsonl").read_text().splitlines()][3:] == [
        "cy",
        "dora",
    ]
    assert adapt("cy", "--bias-lr", "1", "--epochs", "1").exit_code == 0
    bias = next(name for name in before["cy"] if name.endswith(".bias"))
    assert not torch.allclose(store.read("cy")[bias], before["cy"][bias], atol=1e-3)


def test_quiet_is_quiet(train: Any) -> None:
    result = train("--quiet")
    assert result.exit_code == 0 and "users" not in result.stderr and "Training" not in result.stderr


def test_adapt_says_what_its_flags_are_of_one_user(cli: Any) -> None:
    said = " ".join(cli("adapt", "--help").stdout.replace("│", " ").split())
    for words in ("bundled pirate", "every user gets an edit", "best checkpoint", "With --share", "initialisation"):
        assert words not in said


def test_what_adapt_refuses_changes_nothing(
    train: Any, adapt: Any, cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli("adapt", tmp_path / "store", "--user", "ann", "--train-file", "x.csv").exit_code == 2
    assert train().exit_code == 0
    result = adapt("ann")
    assert (result.exit_code, "has no shared part" in result.stderr) == (2, True), result.stderr
    assert train(*SHARE, "--overwrite").exit_code == 0
    store = tmp_path / "store"

    def files() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in store.iterdir()}

    before = files()
    for user, more, told in (
        ("eve", (), "user 'eve' has no rows; 'user' names ann, bob, cy"),
        ("../eve", (), "user '../eve': a name has"),
        ("bob", ("--adapter-column", "owner"), "no column 'owner' (--adapter-column) among"),
        ("BOB", (), "too much alike"),
        ("bob", ("--bias-lr", "0"), "--bias-lr=0.0: must be above 0"),
        ("bob", ("--eval-fraction", "0.9", "--eval-file", store / "none.csv"), "both given"),
        ("bob", ("--dtype", "float1"), "float1"),
    ):
        result = adapt(user, *more)
        assert (result.exit_code, told in result.stderr) == (2, True), result.output
    assert files() == before
    rows = next(store.glob("users-*.safetensors"))
    rows.write_bytes(before[rows.name][:-1])
    with monkeypatch.context() as patch:
        patch.setattr("reftune.users.adapt.load_base", lambda recipe: pytest.fail("found too late"))
        result = adapt("bob")
    assert (result.exit_code, "is cut off or damaged" in result.stderr) == (2, True), result.output
    rows.write_bytes(before[rows.name])
    base = json.loads((store / "fingerprint.json").read_text())
    (store / "fingerprint.json").write_text(json.dumps({**base, "model": "0" * 32}))
    result = adapt("bob")
    assert (result.exit_code, "was trained on other weights" in result.stderr) == (2, True), result.output
    (store / "fingerprint.json").write_text(json.dumps(base))
    shared = next(store.glob("shared-*.safetensors"))
    shared.write_bytes(before[shared.name][:-1] + bytes([before[shared.name][-1] ^ 1]))
    result = adapt("bob")
    assert (result.exit_code, "is not as it was written" in result.stderr) == (2, True), result.output
