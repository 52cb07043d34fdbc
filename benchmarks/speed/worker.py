"""One system, one setting, one process of our environment: prints epoch seconds, losses and peak memory as JSON."""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from transformers import Trainer, TrainingArguments  # noqa: E402

import reftune  # noqa: E402
from benchmarks.speed.peer_model import EpochClock  # noqa: E402
from reftune.data.collating import CompletionCollator  # noqa: E402
from reftune.models import load  # noqa: E402
from reftune.training import ReftTrainer, ReftTrainingArguments  # noqa: E402
from reftune.training.loss import completion_loss  # noqa: E402
from reftune.training.prefix.row_groups import ONE_MORE_FORWARD, plain_groups  # noqa: E402
from reftune.training.prefix.switch import PrefixSwitch  # noqa: E402
from reftune.training.supervised_logits import supervised_forward  # noqa: E402


def adapter(task: dict[str, Any], system: str) -> Any:
    model, _ = load("smollm2")
    torch.manual_seed(0)
    if system.startswith("lora"):
        return get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    config = reftune.ReftConfig(
        r=task["rank"], layers_to_transform=task["layers"], positions=task["positions"], task_type="CAUSAL_LM"
    )
    return get_peft_model(model, config)


def train(task: dict[str, Any], system: str, epochs: int, cache_gib: float | None) -> dict[str, Any]:
    model = adapter(task, system)
    plain = system == "lora"
    options = {
        "per_device_train_batch_size": task["batch_size"], "num_train_epochs": epochs, "learning_rate": 1e-3,
        "report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1,
        "train_sampling_strategy": "sequential", "remove_unused_columns": False, "seed": 0,
    }  # fmt: skip
    folder = tempfile.mkdtemp()
    if not plain:
        options["prefix_reuse"] = "off" if system != "reftune" else "auto"
        options["prefix_cache_gib"] = cache_gib
    arguments = (TrainingArguments if plain else ReftTrainingArguments)(output_dir=folder, **options)
    clock = EpochClock()
    collator = CompletionCollator(task["pad"])

    def without_lengths(rows: list[dict[str, Any]]) -> dict[str, Any]:
        return {name: value for name, value in collator(rows).items() if name != "prompt_lengths"}

    trainer = (Trainer if plain else ReftTrainer)(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(task["rows"]),
        data_collator=without_lengths if plain else collator,
        callbacks=[clock],
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    found: dict[str, Any] = {"epoch_seconds": clock.seconds, "losses": losses}
    if isinstance(trainer, ReftTrainer):
        found["prefix_reuse"] = trainer.report()["prefix_reuse"]
        found["prefix_store"] = trainer.report()["prefix_store"]
    return found


def batches(task: dict[str, Any]) -> list[dict[str, torch.Tensor]]:
    size, rows = task["batch_size"], task["rows"]
    collator = CompletionCollator(task["pad"])
    return [collator(rows[start : start + size]) for start in range(0, len(rows), size)]


def floor(task: dict[str, Any], epochs: int, grouped: bool) -> dict[str, Any]:
    """Base forward and activation-gradient backward of the frozen model, logits at supervised positions only.

    Batches run as they come, padded, as every other system takes them; or ``grouped`` by length as reftune does.
    """
    model, _ = load("smollm2")
    model.train().requires_grad_(False)
    embed, seconds = model.get_input_embeddings(), []
    for _ in range(epochs):
        begin = time.perf_counter()
        for batch in batches(task):
            parts, groups = [], plain_groups(batch, ONE_MORE_FORWARD if grouped else None)
            for _, part in groups if grouped else [([], batch)]:
                inputs = {name: value for name, value in part.items() if name != "prompt_lengths"}
                entering = embed(inputs.pop("input_ids")).requires_grad_(True)
                parts.append(supervised_forward(model, {**inputs, "inputs_embeds": entering}))
            logits, targets = (
                torch.cat(tensors, dim=1) for tensors in zip(*((p.logits, p.targets) for p in parts), strict=True)
            )
            completion_loss(logits, targets).backward()
        seconds.append(time.perf_counter() - begin)
    return {"epoch_seconds": seconds}


def reuse_floor(task: dict[str, Any], epochs: int) -> dict[str, Any]:
    """Cached steps beside their own floor: the same tails through the same blocks, prefix given, no edit, no store.

    The two alternate batch by batch; the floor's entering states require gradients, as the edit's output would.
    """
    model = adapter(task, "reftune").train()
    switch = PrefixSwitch("on", None, [task["rows"]])
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    ours: list[float] = []
    floors: list[float] = []
    for epoch in range(epochs + 1):
        for batch in batches(task):
            begin = time.perf_counter()
            found = switch.forward(model, batch)
            completion_loss(found.logits, found.targets).backward()
            optimizer.step()
            optimizer.zero_grad()
            middle = time.perf_counter()
            if epoch == 0:
                continue
            ours.append(middle - begin)
            seconds = 0.0
            for reduced in switch._reuse.prepare(model, batch):  # type: ignore[union-attr]
                entering = reduced.entering.requires_grad_(True)  # type: ignore[union-attr]
                with model.disable_adapter(), reduced.running() as arguments:
                    begin = time.perf_counter()
                    found = supervised_forward(model, {**arguments, "inputs_embeds": entering * 1.0})
                    completion_loss(found.logits, found.targets).backward()
                    seconds += time.perf_counter() - begin
            floors.append(seconds)
    return {"ours": ours, "floor": floors}


def main() -> None:
    path, system, epochs = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    cache = float(sys.argv[4]) if len(sys.argv) > 4 else None
    torch.set_num_threads(2)
    task = json.loads(path.read_text())
    if system.startswith("floor"):
        found = floor(task, epochs, system == "floor-grouped")
    elif system == "reuse-floor":
        found = reuse_floor(task, epochs)
    else:
        found = train(task, system, epochs, cache)
    found["peak_memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print("RESULT " + json.dumps(found))


if __name__ == "__main__":
    main()
