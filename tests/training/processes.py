"""Training runs for test_multi_process.py: this script under ``torchrun`` in two processes, or its `play` in one."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel, StateDictType, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from reftune.data.collating import CompletionCollator  # noqa: E402
from reftune.training.prefix.obstacles import sharding_obstacle  # noqa: E402
from reftune.training.sharding import retract_shards  # noqa: E402
from tests.training.toy_rows import reft_model, trainer, weights  # noqa: E402

COMMON = {
    "num_train_epochs": 2, "learning_rate": 1e-2, "lr_scheduler_type": "constant", "max_grad_norm": 0.1,
}  # fmt: skip
BEGINNING = [5, 17, 60, 33, 8, 71]
SCENARIOS: dict[str, dict[str, Any]] = {
    "plain": {"prefix_reuse": "off"},
    "reused": {"prefix_reuse": "on"},
    "accumulated": {"prefix_reuse": "on", "gradient_accumulation_steps": 2},
    "shuffled": {"prefix_reuse": "auto", "train_sampling_strategy": "random"},
    "shared": {"prefix_reuse": "on", "positions": "f2+l2", "layers_to_transform": "all"},
    "householder": {"prefix_reuse": "off", "parametrization": "householder"},
}
ADAPTER = ("positions", "layers_to_transform", "parametrization")


def data(count: int, shared: bool) -> list[dict[str, Any]]:
    """Rows of which some have many supervised tokens and some few, so that their mean is no mean of means."""
    generator = torch.Generator().manual_seed(count)

    def draw(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(3, 90, (length,), generator=generator).tolist()

    made = []
    for _ in range(count):
        prompt, completion = BEGINNING * shared + draw(5, 9), draw(1, 9)
        labels = [-100] * len(prompt) + completion
        made.append({"input_ids": prompt + completion, "labels": labels, "prompt_length": len(prompt)})
    return made


def made(name: str, folder: Path, batch: int, **settings: Any) -> Any:
    """The trainer of a scenario, in float64."""
    settings = {
        **COMMON,
        "per_device_train_batch_size": batch,
        "per_device_eval_batch_size": batch,
        **SCENARIOS[name],
        **settings,
    }
    adapter = {"positions": "l2", **{key: settings.pop(key) for key in ADAPTER if key in settings}}
    model = reft_model(init="paper", **adapter).double()
    run = trainer(folder, model, train=data(16, name == "shared"), **settings)
    run.eval_dataset = data(5, name == "shared")  # not a whole number of batches
    return run


def outcome(run: Any) -> dict[str, Any]:
    """What a run came to."""
    return {
        "weights": weights(run.model),
        "losses": [entry["loss"] for entry in run.state.log_history if "loss" in entry],
        "eval_loss": run.evaluate()["eval_loss"],
        "status": run.prefixes.status,
        "store": run.prefixes.summary(),
    }


def play(name: str, folder: Path, batch: int) -> dict[str, Any]:
    """Train a scenario to its end."""
    run = made(name, folder, batch)
    run.train()
    return outcome(run)


def resume(folder: Path, batch: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same training whole, and resumed from a checkpoint after three of its eight steps."""
    settings = {"save_strategy": "steps", "save_steps": 3, "save_total_limit": None, "full_determinism": True}
    whole = made("reused", folder / "whole", batch, **settings)
    whole.train()
    again = made("reused", folder / "again", batch, **settings)
    again.train(resume_from_checkpoint=str(folder / "whole" / "checkpoint-3"))
    return outcome(whole), outcome(again)


def sharded(version: int, folder: Path | None = None) -> tuple[dict[str, Any], str | None]:
    """Plain steps of a model, whole (0) or in the shards of FSDP 1 or 2, and what prefix reuse says to that.

    Under FSDP 1 the adapter is saved into ``folder``, as accelerate and Trainer save it.
    """
    model = reft_model(init="paper", positions="l2").double().train()
    base = model.get_base_model()
    if version == 1:
        policy = ModuleWrapPolicy({type(base.model.layers[0])})
        cpu = torch.device("cpu")
        model = FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=True, device_id=cpu)
    if version == 2:
        mesh = init_device_mesh("cpu", (2,))
        for block in [*base.model.layers, base]:
            fully_shard(block, mesh=mesh)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    inputs = CompletionCollator(0)(data(4, False))
    for _ in range(4):
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        retract_shards(model)
    reason = sharding_obstacle(model)
    if version == 1:
        whole = FullStateDictConfig(rank0_only=True)
        with FullyShardedDataParallel.state_dict_type(model, StateDictType.FULL_STATE_DICT, whole):
            state = model.state_dict()
        if dist.get_rank() == 0:
            model.module.save_pretrained(str(folder), state_dict=state)
        with FullyShardedDataParallel.summon_full_params(model):
            return {n.replace("_fsdp_wrapped_module.", ""): w for n, w in weights(model).items()}, reason
    with torch.no_grad():
        model(**inputs)  # brings the rotation of a whole model back
    kept = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in weights(model).items()}
    return kept, reason


def writers(folder: Path) -> None:
    """Count in ``folder`` how often this process writes an adapter."""
    from peft import PeftModel

    original = PeftModel.save_pretrained

    def counted(self: Any, *args: Any, **kwargs: Any) -> None:
        with open(folder / f"writes-of-{os.environ['RANK']}", "a", encoding="utf-8") as file:
            file.write("x")
        original(self, *args, **kwargs)

    PeftModel.save_pretrained = counted  # type: ignore[method-assign]


def pretend_that_this_is_no_processor(**environment: str) -> None:
    """accelerate takes FSDP and tensor parallelism for processors nowhere; it looks when a trainer is made."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    from reftune import ReftTrainer

    begin = ReftTrainer.__init__

    def told(self: Any, **given: Any) -> None:
        state = PartialState._shared_state
        state["distributed_type"], state["device"] = DistributedType.MULTI_GPU, torch.device("cpu")
        os.environ.update(environment)
        begin(self, **given)

    ReftTrainer.__init__ = told  # type: ignore[method-assign]


def main() -> None:
    """Play every scenario as one of several processes and write down what came out."""
    torch.set_num_threads(1)
    folder, rank = Path(sys.argv[1]), os.environ["RANK"]
    found: dict[str, Any] = {name: play(name, folder / name, batch=2) for name in SCENARIOS}
    writers(folder)
    found["whole"], found["resumed"] = resume(folder / "resume", batch=2)
    found["sharded"] = {version: sharded(version, folder / "fsdp-1") for version in (1, 2)}
    torch.save(found, folder / f"rank-{rank}.pt")
    print(json.dumps({"rank": rank, "status": found["reused"]["status"]}))


if __name__ == "__main__":
    main()
