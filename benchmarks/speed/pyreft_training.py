"""pyreft's side of the speed table, in its own environment: python pyreft_training.py TASK.json EPOCHS SMOLLM2_FOLDER."""

from __future__ import annotations

import json
import logging
import os
import resource
import sys
import tempfile
import warnings
from pathlib import Path

warnings.filterwarnings("ignore")
os.environ["HF_HUB_OFFLINE"] = "1"
logging.disable(logging.WARNING)

import pyreft  # noqa: E402
import torch  # noqa: E402
from peer_model import EpochClock, smollm2  # noqa: E402
from torch.nn.utils.rnn import pad_sequence  # noqa: E402
from transformers import TrainingArguments  # noqa: E402


def places(positions, length):
    first, _, last = positions.partition("+")
    if not last:
        return [length - 1]
    prefix = min(int(first[1:]), length // 2)
    suffix = min(int(last[1:]), length - prefix)
    return [*range(prefix), *range(length - suffix, length)]


def edited(task, folder):
    """The model with LoReFT at the task's layers, rank and positions, as pyreft's own examples make it."""
    model = smollm2(folder)
    representations = [
        {
            "layer": layer, "component": "block_output", "low_rank_dimension": task["rank"],
            "intervention": pyreft.LoreftIntervention(
                embed_dim=model.config.hidden_size, low_rank_dimension=task["rank"], dtype=torch.float32
            ),
        }
        for layer in task["layers"]
    ]  # fmt: skip
    return pyreft.get_reft_model(model, pyreft.ReftConfig(representations=representations))


def collator(task):
    def collate(rows):
        ids = pad_sequence([torch.tensor(r["input_ids"]) for r in rows], True, task["pad"])
        labels = pad_sequence([torch.tensor(r["labels"]) for r in rows], True, -100)
        mask = pad_sequence([torch.ones(len(r["input_ids"]), dtype=torch.long) for r in rows], True, 0)
        spots = [[places(task["positions"], r["prompt_length"])] * len(task["layers"]) for r in rows]
        return {
            "input_ids": ids, "attention_mask": mask, "labels": labels, "intervention_locations": torch.tensor(spots),
        }  # fmt: skip

    return collate


def main():
    task, epochs, folder = json.loads(Path(sys.argv[1]).read_text()), int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(2)
    collate, clock = collator(task), EpochClock()
    trainer = pyreft.ReftTrainerForCausalLM(
        model=edited(task, folder),
        args=TrainingArguments(
            output_dir=tempfile.mkdtemp(), per_device_train_batch_size=task["batch_size"], num_train_epochs=epochs,
            learning_rate=1e-3, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no", logging_steps=1,
            remove_unused_columns=False,
        ),
        train_dataset=task["rows"],
        data_collator=collate,
        callbacks=[clock],
    )  # fmt: skip
    trainer.get_train_dataloader = lambda: torch.utils.data.DataLoader(
        task["rows"], batch_size=task["batch_size"], collate_fn=collate
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print("RESULT " + json.dumps({"epoch_seconds": clock.seconds, "losses": losses, "peak_memory_bytes": memory}))


if __name__ == "__main__":
    main()
