"""Checkpoints are whole or absent, and a failed write says what to do."""

import errno
import json
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from reftune.errors import ReftuneError
from reftune.training.checkpoints import incomplete_reason, last_complete_checkpoint, publish
from tests.training.toy_rows import trainer


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    trainer(folder, save_strategy="steps", save_steps=4, save_total_limit=None).train()
    return folder


def test_the_newest_complete_checkpoint_is_found(finished: Path) -> None:
    assert last_complete_checkpoint(finished) == str(finished / "checkpoint-10")
    assert last_complete_checkpoint(finished / "nowhere") is None


@pytest.mark.parametrize(
    ("file", "damage", "reason"),
    [
        ("adapter_model.safetensors", "cut", "adapter_model.safetensors is damaged"),
        ("optimizer.pt", "cut", "optimizer.pt is damaged"),
        ("rng_state.pth", "cut", "rng_state.pth is damaged"),
        ("trainer_state.json", "cut", "trainer_state.json is damaged"),
        ("trainer_state.json", "remove", "trainer_state.json is missing"),
        ("adapter_model.safetensors", "remove", "adapter_model.safetensors is missing"),
        ("optimizer.pt", "remove", "optimizer.pt is missing"),
        ("scheduler.pt", "remove", "scheduler.pt is missing"),
        ("reftune_state.json", "cut", "reftune_state.json is damaged"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over(
    finished: Path, tmp_path: Path, file: str, damage: str, reason: str
) -> None:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    broken = tmp_path / "checkpoint-10" / file
    if damage == "remove":
        broken.unlink()
    else:
        broken.write_bytes(broken.read_bytes()[: broken.stat().st_size // 2])
    assert incomplete_reason(broken.parent) == reason
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-8")
    with pytest.raises(ReftuneError, match="checkpoint-8, the newest complete one"):
        trainer(tmp_path).train(resume_from_checkpoint=str(broken.parent))
    again = trainer(tmp_path)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 10


def test_resuming_without_any_checkpoint_says_so(tmp_path: Path) -> None:
    with pytest.raises(ReftuneError, match="No complete checkpoint"):
        trainer(tmp_path).train(resume_from_checkpoint=True)
    with pytest.raises(ReftuneError, match="no such folder"):
        trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


FULL = {
    "OSError": OSError(errno.ENOSPC, "No space left on device"),
    "torch": RuntimeError("[enforce fail at inline_container.cc:603] . unexpected pos 64 vs 0"),
}


@pytest.mark.parametrize("kind", FULL)
def test_a_full_disk_names_the_folder_and_spares_the_earlier_checkpoint(
    tmp_path: Path, monkeypatch: Any, kind: str
) -> None:
    run = trainer(tmp_path, save_strategy="steps", save_steps=3)
    save, calls = torch.save, []

    def fill_up(state: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        calls.append(path)
        if len([call for call in calls if str(call).endswith("optimizer.pt")]) == 2:
            raise FULL[kind]
        save(state, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", fill_up)
    with pytest.raises(ReftuneError) as raised:
        run.train()
    assert str(tmp_path) in str(raised.value)
    assert "checkpoint-3 is complete" in str(raised.value)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["checkpoint-3"]
    monkeypatch.undo()
    again = trainer(tmp_path)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 10


def test_a_write_that_the_system_refuses_is_reported_for_real(tmp_path: Path) -> None:
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, before[1]))  # files end at 2 KB, as on a disk that fills up
    try:
        with pytest.raises(ReftuneError, match="Could not write a checkpoint"):
            trainer(tmp_path, save_strategy="steps", save_steps=3).train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []


def test_another_error_while_saving_stays_what_it_is(tmp_path: Path, monkeypatch: Any) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        trainer(tmp_path, save_strategy="steps", save_steps=3).train()


def test_the_limit_counts_finished_checkpoints(tmp_path: Path) -> None:
    trainer(tmp_path, save_strategy="steps", save_steps=2, save_total_limit=2).train()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-8"]


def test_the_recorded_best_checkpoint_is_where_it_was_moved_to(tmp_path: Path) -> None:
    trainer(tmp_path, save_strategy="epoch", eval_strategy="epoch", metric_for_best_model="loss").train()
    for folder in tmp_path.iterdir():
        recorded = json.loads((folder / "trainer_state.json").read_text())["best_model_checkpoint"]
        assert Path(recorded).is_dir() and Path(recorded).parent == tmp_path


def test_publishing_replaces_what_was_there(tmp_path: Path) -> None:
    new, old = tmp_path / "new", tmp_path / "checkpoint-1"
    for folder in (new, old):
        folder.mkdir()
        (folder / folder.name).touch()
    publish(str(new), str(old))
    assert [file.name for file in old.iterdir()] == ["new"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint-1"]
