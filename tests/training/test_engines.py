"""Trainer on FSDP 2, and on DeepSpeed's ZeRO 1, 2 and 3 where it is installed, trains what one process trains.

As a script: one of two processes, by `python -m torch.distributed.run`. accelerate takes FSDP for no processor, so it is
told of another kind of device. (Gathering for FSDP 1, torch reads freed memory on a processor: test_multi_process.py.)
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

from reftune.adapter.config import load_adapter  # noqa: E402
from reftune.errors import ReftuneError  # noqa: E402
from reftune.training.prefix.obstacles import sharding_obstacle  # noqa: E402
from tests.tiny_models import TINY  # noqa: E402
from tests.training.processes import data, pretend_that_this_is_no_processor  # noqa: E402
from tests.training.toy_rows import reft_model, trainer  # noqa: E402

BLOCK = {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], "state_dict_type": "FULL_STATE_DICT"}
FSDP = {**BLOCK, "sync_module_states": False, "cpu_ram_efficient_loading": False, "use_orig_params": True}
ENGINES = ["fsdp2", "zero1", "zero2", "zero3"]
RESUMES = Version(version("accelerate")) >= Version("1.15")
"""accelerate 1.10 gives the first process alone the adapter that FSDP 2 resumes from; not looked at between."""
SCENARIOS: dict[str, dict[str, Any]] = {
    "plain": {"per_device_train_batch_size": 2},
    "accumulated": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
    "bf16": {"per_device_train_batch_size": 2, "bf16": True},
}
ONE_PROCESS: dict[str, dict[str, Any]] = {
    "plain": {"per_device_train_batch_size": 4},
    "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "bf16": {"per_device_train_batch_size": 4, "bf16": True},
}


def engine_settings(engine: str) -> dict[str, Any]:
    """What Trainer is told of an engine, or of none."""
    if engine.startswith("fsdp"):
        return {"fsdp": True, "fsdp_config": {**FSDP, "fsdp_version": int(engine[-1])}}
    if engine.startswith("zero"):
        auto = (
            "train_micro_batch_size_per_gpu",
            "gradient_accumulation_steps",
            "train_batch_size",
            "gradient_clipping",
        )
        stage = {"stage": int(engine[-1]), "stage3_gather_16bit_weights_on_model_save": True}
        allowed = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
        return {
            "deepspeed": {
                **dict.fromkeys(auto, "auto"),
                "bf16": {"enabled": "auto"},
                "zero_optimization": stage,
                **allowed,
            }
        }
    return {}


def made(model: Any, folder: Path, engine: str, **settings: Any) -> Any:
    """A trainer of a rotation, whose steps are long enough to bend it."""
    common = {"num_train_epochs": 2, "learning_rate": 5e-2, "lr_scheduler_type": "constant", "prefix_reuse": "off"}
    return trainer(folder, model, train=data(16, False), **common, **engine_settings(engine), **settings)


def outcome(run: Any, folder: Path) -> dict[str, Any]:
    """Losses, that of held-out rows, and what the saved adapter comes to on them in a model of its own."""
    run.eval_dataset = data(6, False)  # pyright: ignore[reportAttributeAccessIssue]
    found = {
        "losses": [entry["loss"] for entry in run.state.log_history if "loss" in entry],
        "eval_loss": run.evaluate()["eval_loss"],
        "reuse": sharding_obstacle(run.model_wrapped),
        "kind": str(run.accelerator.distributed_type),
    }
    run.save_model(str(folder))
    if run.is_deepspeed_enabled:
        try:
            run.model.save_pretrained(str(folder.with_name("pieces")))
        except ReftuneError:
            found["refused"] = True
    return found


def play(engine: str, folder: Path, scenarios: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Every scenario, and one that ends after three of its eight steps and is gone on with."""
    found = {}
    # All before a trainer is made, as DeepSpeed then puts every new model in pieces.
    models = [reft_model(init="paper", positions="l2").float() for _ in range(len(scenarios) + 2)]
    for name, settings in scenarios.items():
        run = made(models.pop(), folder / name, engine, **settings)
        run.train()
        found[name] = outcome(run, folder / name / "saved")
    if engine == "fsdp2" and not RESUMES:
        return found
    kept = {"save_strategy": "steps", "save_steps": 3, "save_total_limit": None, **scenarios["plain"]}
    made(models.pop(), folder / "kept", engine, max_steps=3, **kept).train()
    again = made(models.pop(), folder / "kept", engine, **kept)
    again.train(resume_from_checkpoint=str(folder / "kept" / "checkpoint-3"))
    found["resumed"] = outcome(again, folder / "kept" / "saved")
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process comes to without an engine."""
    return play("none", tmp_path_factory.mktemp("alone"), ONE_PROCESS)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_trains_saves_and_resumes_as_one_process_does(
    engine: str, alone: dict[str, Any], tmp_path: Path
) -> None:
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run([*launch, __file__, engine, str(tmp_path)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    found = torch.load(tmp_path / "found.pt")
    for name, result in found.items():
        whole = alone["plain" if name == "resumed" else name]
        within = 3e-2 if name == "bf16" else 2e-6  # of losses near 5: some roundings of float32, or of bfloat16
        expected = whole["losses"][3:] if name == "resumed" else whole["losses"]
        assert result["losses"][-len(expected) :] == pytest.approx(expected, rel=within), name
        assert result["eval_loss"] == pytest.approx(whole["eval_loss"], rel=within), name
        assert result["reuse"] is not None and ("FSDP" in result["kind"] or "DEEPSPEED" in result["kind"])
        assert result.get("refused", False) == (engine == "zero3")  # an adapter of pieces
        loaded = load_adapter(TINY["llama"]().float(), tmp_path / ("kept" if name == "resumed" else name) / "saved")
        rotation = next(weight for key, weight in loaded.named_parameters() if key.endswith("rotation"))
        assert (rotation @ rotation.mT - torch.eye(len(rotation))).abs().max() < 1e-6
        kept = trainer(tmp_path / "kept-loss", loaded)
        kept.eval_dataset = data(6, False)  # type: ignore[assignment]
        assert kept.evaluate()["eval_loss"] == pytest.approx(result["eval_loss"], rel=within), name


def main() -> None:
    """Play every scenario on an engine and write down what came out."""
    torch.set_num_threads(1)
    engine, folder = sys.argv[1], Path(sys.argv[2])
    if engine.startswith("fsdp"):
        pretend_that_this_is_no_processor(ACCELERATE_USE_FSDP="true")
    found = play(engine, folder, SCENARIOS)
    if int(os.environ["RANK"]) == 0:
        torch.save(found, folder / "found.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
