"""Several processes train what one trains, with prefix reuse and without; what is sharded says what it does not do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from reftune.adapter.config import load_adapter
from reftune.errors import ReftuneError
from tests.tiny_models import TINY
from tests.training.processes import SCENARIOS, play, sharded
from tests.training.toy_rows import reft_model


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """What two processes came to, each with batches of 2; one launch for all tests, as starting them is what takes."""
    folder = tmp_path_factory.mktemp("processes")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = str(Path(__file__).with_name("processes.py"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([*launch, script, str(folder)], capture_output=True, text=True, timeout=280, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    found = [torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in (0, 1)]
    return SimpleNamespace(found=found, folder=folder)


def furthest(some: dict[str, Any], others: dict[str, Any]) -> float:
    """The largest difference of any weight."""
    assert some.keys() == others.keys() and some
    return max(float((some[name] - others[name]).abs().max()) for name in some)


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_processes_with_batches_of_two_train_as_one_with_batches_of_four(
    ranks: SimpleNamespace, name: str, tmp_path: Path
) -> None:
    first, second = (found[name] for found in ranks.found)
    if name == "shuffled":  # another order than one process draws: the processes agree, that is all
        assert furthest(first["weights"], second["weights"]) == 0
        return
    alone = play(name, tmp_path, batch=4)
    assert furthest(first["weights"], second["weights"]) == 0
    # Householder vectors have entries without a gradient, of which Adam makes steps of the size of rounding.
    assert furthest(first["weights"], alone["weights"]) < (1e-7 if name == "householder" else 1e-12)
    assert first["losses"] == pytest.approx(alone["losses"], rel=1e-6)
    assert first["eval_loss"] == pytest.approx(alone["eval_loss"], rel=1e-6)
    assert second["eval_loss"] == first["eval_loss"]


def test_prefix_reuse_changes_nothing_and_each_process_stores_its_own_rows(ranks: SimpleNamespace) -> None:
    for found in ranks.found:
        assert found["reused"]["status"] == found["accumulated"]["status"] == found["shared"]["status"] == "on"
        assert found["plain"]["status"] == "off: asked for"
        assert furthest(found["reused"]["weights"], found["plain"]["weights"]) < 1e-6
    entries = [found["reused"]["store"]["entries"] for found in ranks.found]
    # A prefix and a tail for each of 16 training rows and 5 held-out ones, and little twice.
    assert all(count < 2 * 16 for count in entries) and 2 * 21 <= sum(entries) <= 2 * 25


def test_one_process_writes_the_checkpoints_and_a_resumed_run_is_the_whole_run(ranks: SimpleNamespace) -> None:
    assert (ranks.folder / "writes-of-0").read_text()
    assert not (ranks.folder / "writes-of-1").exists()
    written = ranks.folder / "resume" / "whole" / "checkpoint-3"
    assert json.loads((written / "trainer_state.json").read_text())["global_step"] == 3
    for found in ranks.found:
        assert furthest(found["resumed"]["weights"], found["whole"]["weights"]) == 0
        assert found["resumed"]["losses"] == found["whole"]["losses"]


@pytest.mark.parametrize("version", [1, 2])
def test_shards_train_as_the_whole_does_and_prefix_reuse_says_why_it_is_off(
    ranks: SimpleNamespace, version: int
) -> None:
    expected, _ = sharded(0)
    for found in ranks.found:
        kept, reason = found["sharded"][version]
        assert furthest(kept, expected) < 1e-6
        rotation = next(weight for name, weight in kept.items() if name.endswith("rotation"))
        assert (rotation @ rotation.mT - torch.eye(len(rotation))).abs().max() < 1e-12
        assert reason is not None and reason.startswith(f"FSDP {version} shards the parameters")


def test_what_fsdp_1_gathers_and_saves_is_the_adapter(ranks: SimpleNamespace) -> None:
    kept, _ = ranks.found[0]["sharded"][1]
    loaded = load_adapter(TINY["llama"]().double(), ranks.folder / "fsdp-1")
    saved = {name: weight for name, weight in loaded.named_parameters() if ".intervention." in name}
    assert furthest({name: weight.detach() for name, weight in saved.items()}, kept) < 1e-6


def test_an_adapter_that_lacks_a_tensor_is_not_saved(tmp_path: Path) -> None:
    model = reft_model()
    whole = model.state_dict()
    for lacking in ("rotation", "bias", ""):
        state = {name: weight for name, weight in whole.items() if not name.endswith(lacking)}
        with pytest.raises(ReftuneError, match=f"'default' cannot be saved: .*{lacking or 'rotation'} is not here"):
            model.save_pretrained(str(tmp_path / "out"), state_dict=state)
    assert not (tmp_path / "out").exists()
    model.save_pretrained(str(tmp_path / "out"), state_dict=whole)
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
