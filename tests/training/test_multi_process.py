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
from torch import nn

from reftune.errors import ReftuneError
from reftune.training.sharding import refuse_lost_retractions
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


def test_shards_train_as_the_whole_does_and_prefix_reuse_says_why_it_is_off(ranks: SimpleNamespace) -> None:
    expected, _ = sharded(False)
    for found in ranks.found:
        kept, reason = found["sharded"]
        assert furthest(kept, expected) < 1e-6
        assert reason is not None and reason.startswith("FSDP 2 shards the parameters")


def test_a_rotation_that_a_wrapper_keeps_a_copy_of_is_refused_and_others_are_not() -> None:
    class DeepSpeedEngine(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    with pytest.raises(ReftuneError, match="DeepSpeed keeps copies.*DistributedDataParallel"):
        refuse_lost_retractions(DeepSpeedEngine(reft_model()))
    refuse_lost_retractions(DeepSpeedEngine(reft_model(method="direft")))
    refuse_lost_retractions(reft_model())
