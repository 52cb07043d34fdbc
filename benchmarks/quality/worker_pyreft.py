"""pyreft trained and scored on a task, in its own environment: python worker_pyreft.py TASK.json SMOLLM2_FOLDER.

The task holds tokenised `rows` and `held_out` rows, the adapter's layers, rank and positions, and the training settings
of the run that it is compared with (AdamW, linear schedule, no weight decay, gradients clipped to 1).
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "speed"))

import torch  # noqa: E402

from pyreft_training import collator, edited, pyreft  # noqa: E402  # isort: skip
from transformers import TrainingArguments, set_seed  # noqa: E402


@torch.no_grad()
def held_out_loss(model, task):
    """Mean loss of a supervised token."""
    collate, total, tokens = collator(task), 0.0, 0
    for row in task["held_out"]:
        batch = collate([row])
        _, output = model(
            {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]},
            unit_locations={"sources->base": (None, batch["intervention_locations"].permute(1, 0, 2).tolist())},
            use_cache=False,
        )
        logits, labels = output.logits[0, :-1].float(), batch["labels"][0, 1:]
        kept = labels != -100
        total += float(torch.nn.functional.cross_entropy(logits[kept], labels[kept], reduction="sum"))
        tokens += int(kept.sum())
    return total / tokens


def main():
    task, folder = json.loads(Path(sys.argv[1]).read_text()), sys.argv[2]
    set_seed(task["seed"])
    model = edited(task, folder)
    trainer = pyreft.ReftTrainerForCausalLM(
        model=model,
        args=TrainingArguments(
            output_dir=tempfile.mkdtemp(), per_device_train_batch_size=task["batch_size"],
            num_train_epochs=task["epochs"], learning_rate=task["lr"], weight_decay=0.0, lr_scheduler_type="linear",
            report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no", remove_unused_columns=False,
            seed=task["seed"],
        ),
        train_dataset=task["rows"],
        data_collator=collator(task),
    )  # fmt: skip
    trainer.get_train_dataloader = lambda: torch.utils.data.DataLoader(
        task["rows"], batch_size=task["batch_size"], collate_fn=collator(task), shuffle=True,
        generator=torch.Generator().manual_seed(task["seed"]),
    )  # fmt: skip
    trainer.train()
    model.model.eval()
    print("RESULT " + json.dumps({"loss": held_out_loss(model, task)}))


main()
