"""A base spread over two processes by transformers' tensor parallelism is edited and trained as one process has it.

As a script: one of two processes, by `python -m torch.distributed.run`. accelerate takes tensor parallelism for no
processor, so the trainer is told of another kind of device.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from packaging.version import Version
from peft import get_peft_model
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

from reftune import ReftConfig  # noqa: E402
from reftune.engine import hooks, intervention  # noqa: E402
from reftune.engine.sites import find_sites  # noqa: E402
from reftune.engine.tensor_parallel import check_spread  # noqa: E402
from reftune.errors import ReftuneError  # noqa: E402
from tests.tiny_models import TINY  # noqa: E402
from tests.training.processes import data, pretend_that_this_is_no_processor  # noqa: E402
from tests.training.toy_rows import trainer, weights  # noqa: E402

WHOLE = ["block_output", "mlp_input", "attention_output"]
IN_PIECES = ["key_output", "head_output[0]", "head_output[0,3]", "model.layers.{layer}.mlp.act_fn"]
IDS = torch.arange(3, 17).view(2, 7)
TRAINS = Version(accelerate.__version__) > Version("1.12.0")
"""Whether transformers takes this accelerate for a training of what is spread."""
LABELS = IDS.masked_fill(torch.arange(7) < 4, -100)


def edited(base: Any, component: str, seed: int) -> Any:
    """The base with an edit whose first values come from a seed."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {"r": 2, "init": "paper", "positions": "l2+generated", "layers_to_transform": [0, 2]}
    return get_peft_model(base, ReftConfig(component=component, task_type="CAUSAL_LM", **settings)).eval()


def outcome(model: Any) -> dict[str, Any]:
    """A loss with what it comes from and what it gives, and a greedy answer; the adapter is taken off again."""
    found = model(input_ids=IDS, labels=LABELS)
    found.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    answer = model.generate(input_ids=IDS, max_new_tokens=4, do_sample=False)
    model.unload()
    return {"loss": found.loss.detach(), "logits": found.logits.detach(), "gradients": gradients, "answer": answer}


def play(base: Any, folder: Path, rank: int = 0) -> dict[str, Any]:
    """What edits at every component come to, and three steps of training."""
    found: dict[str, Any] = {
        component: outcome(edited(base, component, rank + 1)) for component in [*WHOLE, *IN_PIECES]
    }
    if not TRAINS:
        return found
    # Five rows in batches of two: the last batch of an epoch is no whole one.
    model = edited(base, "block_output", rank + 1).train()
    settings = {"max_steps": 4, "learning_rate": 1e-2, "lr_scheduler_type": "constant"}
    run = trainer(folder / "run", model, train=data(5, False), **settings)
    run.train()
    run.save_model(str(folder / "saved"))
    found["trained"] = {
        "losses": torch.tensor([entry["loss"] for entry in run.state.log_history if "loss" in entry]),
        "eval_loss": torch.tensor(run.evaluate()["eval_loss"]),
        "weights": weights(run.model),
        "tokens": run.throughput.tokens,
    }
    found["reuse"] = run.prefixes.status
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model on disk, and what the two processes wrote."""
    place = tmp_path_factory.mktemp("parallel")
    base: Any = TINY["llama"]()
    base.resize_token_embeddings(98, mean_resizing=False)  # earlier transformers cut even counts only
    base.save_pretrained(place / "base")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([*launch, __file__, str(place)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return place


@pytest.fixture(scope="module")
def alone(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process comes to."""
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float64)
    return play(base, tmp_path_factory.mktemp("alone"))


def test_edits_and_training_are_those_of_one_process(folder: Path, alone: dict[str, Any]) -> None:
    for rank in range(2):
        found = torch.load(folder / f"rank-{rank}.pt")
        assert found.pop("rows of a query projection") == 16 == TINY["llama"]().config.hidden_size // 2
        controls = found.pop("controls")
        assert not TRAINS or ("tensor parallelism" in found.pop("reuse") and alone["reuse"] == "on")
        for name, result in found.items():
            torch.testing.assert_close(result, alone[name], rtol=1e-6, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")
        # What would show if heads' results were edited as this process has them, or every process drew its own edit.
        assert abs(controls["in pieces"] - alone["head_output[0]"]["loss"]) > 1e-3
        assert abs(controls["not shared"] - alone["block_output"]["loss"]) > 1e-3 or rank == 0
    assert (folder / "saved" / "adapter_model.safetensors").exists() is TRAINS


@pytest.mark.parametrize(
    ("plan", "component"),
    [
        ({"model.layers.*.mlp.gate_proj": "packed_colwise"}, "model.layers.{layer}.mlp.gate_proj"),
        ({"model.layers.*.mlp": "all_reduce"}, "model.layers.{layer}.mlp.down_proj"),
        ({"model.norm": "sequence_parallel"}, "block_output"),
    ],
)
def test_a_place_where_no_process_has_the_tensor_is_refused(plan: dict[str, str], component: str) -> None:
    model: Any = TINY["llama"]()
    model._tp_plan = plan
    site = find_sites(model, component, [1])[0]
    check_spread(model, site)  # such a plan is there, but not followed
    model._tp_size = 2
    with pytest.raises(ReftuneError, match=f"tensor parallelism keeps.*{next(iter(plan.values()))}"):
        check_spread(model, site)


def main() -> None:
    """One of two processes: play, and once more as it would be wrong."""
    from transformers.distributed.configuration_utils import DistributedConfig

    torch.set_num_threads(1)
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    parallel: Any = {"distributed_config": DistributedConfig(tp_plan="auto")}
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float64, **parallel)
    pretend_that_this_is_no_processor()
    found = play(base, folder, rank)
    weight = base.model.layers[0].self_attn.q_proj.weight
    assert isinstance(weight, DTensor)
    found["rows of a query projection"] = len(weight.to_local())
    hooks.share_tensors = lambda edit, block: None
    controls = {"not shared": outcome(edited(base, "block_output", rank + 1))["loss"]}
    hooks.edit_whole = lambda edit, block, channels, hidden: edit(hidden)
    intervention._check_channels = lambda site, hidden: None
    controls["in pieces"] = outcome(edited(base, "head_output[0]", 1))["loss"]
    found["controls"] = controls
    torch.save(found, folder / f"rank-{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
