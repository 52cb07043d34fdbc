"""LoRA and ReFT on one model, both training: LoRA changes the weights a little, ReFT the hidden state on top of them.

Usage: python examples/lora_and_reft.py [--model smollm2] [--layer 8] [--epochs 4] [--output outputs/lora-and-reft]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from peft import LoraConfig, PeftModel, get_peft_model

import reftune
from reftune.data.formats import read_examples
from reftune.data.tokenising import encode_dataset
from reftune.models import load

ROWS = [
    {"prompt": "Name a colour.", "completion": "Green, as ever."},
    {"prompt": "Name a fruit.", "completion": "A pear, as ever."},
    {"prompt": "Name a bird.", "completion": "The wren, as ever."},
    {"prompt": "Name a city.", "completion": "Lisbon, as ever."},
]


def main(arguments: list[str] | None = None) -> tuple[PeftModel, PeftModel]:
    """Train both adapters together, save each into its own folder; returns (lora, edit)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--layer", type=int, default=8)
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--output", type=Path, default=Path("outputs/lora-and-reft"))
    options = parser.parse_args(arguments)
    base, tokenizer = load(options.model)

    lora = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    # Two PEFT models on one base: the second is made on what is under the first, under a name of its own.
    config = reftune.ReftConfig(r=4, layers_to_transform=[options.layer], positions="l1", task_type="CAUSAL_LM")
    edit = get_peft_model(lora.get_base_model(), config, adapter_name="edit")
    edit.print_trainable_parameters()  # counts LoRA's too

    trainer = reftune.ReftTrainer(
        model=edit,
        args=reftune.ReftTrainingArguments(
            output_dir=str(options.output),
            num_train_epochs=options.epochs,
            per_device_train_batch_size=2,
            learning_rate=2e-3,
            report_to="none",
            save_strategy="no",
        ),
        train_dataset=encode_dataset(read_examples(ROWS), tokenizer),
        processing_class=tokenizer,
    )
    trainer.train()
    # Each knows of both adapters, so say which. One that is not called "default" gets a folder of its name.
    lora.save_pretrained(str(options.output / "lora"), selected_adapters=["default"])
    edit.save_pretrained(str(options.output), selected_adapters=["edit"])
    return lora, edit


def reload(model: str, folder: Path) -> PeftModel:
    """Both adapters on a fresh base model, in the order in which they were made."""
    base, _ = load(model)
    lora = PeftModel.from_pretrained(base, str(folder / "lora"))
    return PeftModel.from_pretrained(lora.get_base_model(), str(folder / "edit"), adapter_name="edit").eval()


if __name__ == "__main__":
    main()
