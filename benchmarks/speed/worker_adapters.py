"""adapters' side of the speed table, in its own environment: python worker_adapters.py TASK.json EPOCHS FOLDER."""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import warnings
from pathlib import Path

warnings.filterwarnings("ignore")
os.environ["HF_HUB_OFFLINE"] = "1"

import adapters  # noqa: E402
import torch  # noqa: E402
from adapters import AdapterTrainer, LoReftConfig  # noqa: E402
from peer_model import EpochClock, smollm2  # noqa: E402
from torch.nn.utils.rnn import pad_sequence  # noqa: E402
from transformers import TrainingArguments  # noqa: E402


def main():
    task, epochs, folder = json.loads(Path(sys.argv[1]).read_text()), int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(2)
    model = smollm2(folder)
    adapters.init(model)
    first, _, last = task["positions"].partition("+")
    sides = (int(first[1:]), int(last[1:])) if last else (0, int(first[1:]))
    every = len(task["layers"]) == model.config.num_hidden_layers
    config = LoReftConfig(
        layers="all" if every else task["layers"], prefix_positions=sides[0], suffix_positions=sides[1],
        r=task["rank"], tied_weights=True,
    )  # fmt: skip
    model.add_adapter("edit", config=config)
    model.train_adapter("edit")

    def collate(rows):
        return {
            "input_ids": pad_sequence([torch.tensor(r["input_ids"]) for r in rows], True, task["pad"]),
            "labels": pad_sequence([torch.tensor(r["labels"]) for r in rows], True, -100),
            "attention_mask": pad_sequence([torch.ones(len(r["input_ids"]), dtype=torch.long) for r in rows], True, 0),
        }

    clock = EpochClock()
    trainer = AdapterTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=tempfile.mkdtemp(), per_device_train_batch_size=task["batch_size"], num_train_epochs=epochs,
            learning_rate=1e-3, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no", logging_steps=1,
            remove_unused_columns=False,
        ),
        train_dataset=task["rows"],
        data_collator=collate,
        callbacks=[clock],
    )  # fmt: skip
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print("RESULT " + json.dumps({"epoch_seconds": clock.seconds, "losses": losses, "peak_memory_bytes": memory}))


main()
