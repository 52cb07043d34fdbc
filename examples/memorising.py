"""How much fits into one edited token? A rank-1 edit at one place learns a passage by heart.

Usage: python examples/memorising.py [--model smollm2] [--layer 8] [--steps 200] [--rank 1] [--file TEXT]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from peft import get_peft_model
from transformers import TrainerCallback

import reftune
from reftune.data.collating import CompletionCollator
from reftune.models import load

PASSAGE = (
    "The lighthouse keeper wound the clock at six, set two plates on the table though he lived alone, and read the "
    "weather aloud to the cat, who knew it already."
)


class UntilLearned(TrainerCallback):
    """Stops once the loss says that every token is certain."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Look at the loss just logged."""
        control.should_training_stop |= (logs or {}).get("loss", 1.0) < 0.01


def main(arguments: list[str] | None = None) -> tuple[float, str]:
    """Learn the passage; returns the share of its tokens that are said right from the start on, and what is said."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--layer", type=int, default=8)
    parser.add_argument("--rank", type=int, default=1)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--learning-rate", type=float, default=2e-2)
    parser.add_argument("--file", type=Path, help="a text to learn instead")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    base, tokenizer = load(options.model)
    passage = options.file.read_text(encoding="utf-8") if options.file else PASSAGE

    # The prompt is one token that means nothing by itself; everything has to come out of the edit.
    prompt = tokenizer("->", add_special_tokens=False).input_ids[:1]
    text = tokenizer(passage, add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
    row = {"input_ids": prompt + text, "labels": [-100] + text, "prompt_length": 1}
    config = reftune.ReftConfig(
        r=options.rank, layers_to_transform=[options.layer], positions="l1", method="direft", task_type="CAUSAL_LM"
    )
    model = get_peft_model(base, config)
    reftune.ReftTrainer(
        model=model,
        args=reftune.ReftTrainingArguments(
            output_dir="outputs/memorising",
            max_steps=options.steps,
            per_device_train_batch_size=1,
            learning_rate=options.learning_rate,
            lr_scheduler_type="constant",
            report_to="none",
            save_strategy="no",
        ),
        train_dataset=[row],
        data_collator=CompletionCollator(tokenizer.pad_token_id),
        callbacks=[UntilLearned()],
    ).train()

    model.eval()
    ids = torch.tensor([prompt], device=model.device)
    with torch.no_grad():
        tokens = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=len(text), do_sample=False
        )
    said = tokens[0, 1:].tolist()
    right = next((i for i, (a, b) in enumerate(zip(said, text, strict=False)) if a != b), min(len(said), len(text)))
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    answer = tokenizer.decode(said, skip_special_tokens=True)
    print(f"{right} of {len(text)} tokens in {trainable:,} numbers:\n{answer}")
    return right / len(text), answer


if __name__ == "__main__":
    main()
