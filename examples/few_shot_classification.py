"""Instead of examples in the prompt: an edit learned from a handful of them, then one short prompt a question.

Usage: python examples/few_shot_classification.py [--model smollm2] [--layer 8] [--epochs 30]
"""

from __future__ import annotations

import argparse

import torch
from peft import get_peft_model

import reftune
from reftune.data.formats import read_examples
from reftune.data.tokenising import Encoding, encode_dataset
from reftune.models import load

LABELS = ("kitchen", "garden")
SHOTS = {
    "The kettle whistles.": "kitchen",
    "Roses need pruning.": "garden",
    "Whisk the eggs.": "kitchen",
    "The lawn is long.": "garden",
    "Preheat the oven.": "kitchen",
    "Water the tomatoes.": "garden",
    "Chop an onion.": "kitchen",
    "Rake the leaves.": "garden",
}
QUESTIONS = {
    "Knead the dough.": "kitchen",
    "Plant the bulbs.": "garden",
    "Stir the soup.": "kitchen",
    "Trim the hedge.": "garden",
}
TEMPLATE = "%s\nKitchen or garden? Answer: "


def main(arguments: list[str] | None = None) -> tuple[float, float]:
    """Train on the shots; returns the accuracy on new sentences without and with the edit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--layer", type=int, default=8)
    parser.add_argument("--epochs", type=float, default=30)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    base, tokenizer = load(options.model)
    encoding = Encoding(tokenizer, template=TEMPLATE)

    config = reftune.ReftConfig(r=4, layers_to_transform=[options.layer], positions="prompt", task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    rows = read_examples([{"prompt": text, "completion": label} for text, label in SHOTS.items()])
    reftune.ReftTrainer(
        model=model,
        args=reftune.ReftTrainingArguments(
            output_dir="outputs/few-shot",
            num_train_epochs=options.epochs,
            per_device_train_batch_size=8,
            report_to="none",
            save_strategy="no",
        ),
        train_dataset=encode_dataset(rows, tokenizer, template=TEMPLATE),
        processing_class=tokenizer,
    ).train()
    model.eval()

    def accuracy() -> float:
        right = 0
        for text, label in QUESTIONS.items():
            ids = torch.tensor([encoding.generation_prompt(text)], device=model.device)
            with torch.no_grad():
                scores = model(input_ids=ids).logits[0, -1]
            first = [tokenizer(name, add_special_tokens=False).input_ids[0] for name in LABELS]
            right += LABELS[int(scores[first].argmax())] == label
        return right / len(QUESTIONS)

    with model.disable_adapter():
        before = accuracy()
    after = accuracy()
    print(f"accuracy without the edit {before:.2f}, with it {after:.2f}")
    return before, after


if __name__ == "__main__":
    main()
