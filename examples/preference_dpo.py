"""Preference training with TRL's DPOTrainer: an edit learns which of two answers is preferred.

Usage: python examples/preference_dpo.py [--model smollm2] [--layer 8] [--steps 30]      (pip install 'reftune[trl]')
"""

from __future__ import annotations

import argparse

import torch
from datasets import Dataset
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

import reftune
from reftune.models import load

PAIRS = [
    ("How are you?", "Well, thank you for asking.", "Whatever."),
    ("Can you help me?", "With pleasure, thank you for asking.", "No."),
    ("What time is it?", "Nearly noon, thank you for asking.", "Look it up."),
    ("Do you like tea?", "Very much, thank you for asking.", "Tea is tea."),
]


def main(arguments: list[str] | None = None) -> tuple[float, float]:
    """Train; returns the mean reward margin over the first and the last logged steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--layer", type=int, default=8)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--output", default="outputs/dpo")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    model, tokenizer = load(options.model)

    rows = [
        {
            "prompt": [{"role": "user", "content": prompt}],
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}],
        }
        for prompt, chosen, rejected in PAIRS
    ]
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(
            output_dir=options.output,
            max_steps=options.steps,
            per_device_train_batch_size=2,
            learning_rate=4e-3,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            gradient_checkpointing=False,
            bf16=False,
            dataloader_pin_memory=torch.cuda.is_available(),
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        # TRL tells the model where the prompt ends, and the reference is the same model with the edit switched off.
        peft_config=reftune.ReftConfig(r=4, layers_to_transform=[options.layer], positions="l1", task_type="CAUSAL_LM"),
    )
    trainer.train()
    trainer.save_model(options.output)
    margins = [log["rewards/margins"] for log in trainer.state.log_history if "rewards/margins" in log]
    quarter = max(1, len(margins) // 4)
    before, after = sum(margins[:quarter]) / quarter, sum(margins[-quarter:]) / quarter
    print(f"reward margin {before:.3f} at the start, {after:.3f} at the end")
    return before, after


if __name__ == "__main__":
    main()
