"""DeepSpeed's ZeRO 1, 2 and 3 train a rotation as plain steps do; run where DeepSpeed is installed.

As a script: the same in one of two processes, by `python -m torch.distributed.run`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

from reftune.data.collating import CompletionCollator  # noqa: E402
from reftune.errors import ReftuneError  # noqa: E402
from reftune.training.sharding import retract_shards  # noqa: E402
from tests.training.processes import data  # noqa: E402
from tests.training.toy_rows import reft_model  # noqa: E402


def stepped(stage: int) -> dict[str, Any]:
    """Losses of six steps and of the end, and how far the rotation is from orthonormal; stage 0: without DeepSpeed."""
    model: Any = reft_model(init="paper", positions="l2").float().train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer: Any = torch.optim.AdamW(trained, lr=0.05, weight_decay=0.0)
    inputs, losses, saved = CompletionCollator(0)(data(4, False)), [], True
    if stage:
        import deepspeed  # pyright: ignore[reportMissingImports]

        config = {
            "train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
        }  # fmt: skip
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    for _ in range(6):
        loss = (engine if stage else model)(**inputs).loss
        losses.append(float(loss.detach()))
        if stage:
            engine.backward(loss)
            engine.step()
            retract_shards(engine.module)
        else:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    with torch.no_grad():
        losses.append(float((engine if stage else model)(**inputs).loss))
    rotation = next(p for name, p in model.named_parameters() if name.endswith("rotation"))
    if stage:
        rotation = deepspeed.utils.safe_get_full_fp32_param(rotation)
    if stage == 3:
        try:
            model.save_pretrained("never")
        except ReftuneError:
            saved = False
    rotation = rotation.detach()
    off = float((rotation @ rotation.mT - torch.eye(len(rotation))).abs().max())
    return {"losses": losses, "off": off, "saved": saved}


def test_deepspeed_trains_a_rotation_as_plain_steps_do(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run([*launch, str(tmp_path / "found")], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    plain = stepped(0)
    for stage, found in json.loads((tmp_path / "found").read_text()).items():
        assert found["losses"] == pytest.approx(plain["losses"], abs=1e-6), f"ZeRO {stage}"
        assert found["off"] < 1e-6 and found["saved"] == (stage != "3")


if __name__ == "__main__":
    import deepspeed  # pyright: ignore[reportMissingImports]

    deepspeed.init_distributed("gloo")
    results = {stage: stepped(stage) for stage in (1, 2, 3)}
    if torch.distributed.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(results))
    torch.distributed.destroy_process_group()
