"""Train one adapter in several processes, on several GPUs or CPUs: the script of one process, launched more often.

Usage: accelerate launch --num_processes 2 examples/several_processes.py [--model smollm2] [--limit N]
       torchrun --nproc_per_node 2 examples/several_processes.py --cpu

Each process trains on its own rows of every batch and stores the prefixes of those alone; gradients are averaged, so
that two processes with batches of 4 train as one with batches of 8. One process writes.
"""

from __future__ import annotations

import argparse

from peft import get_peft_model

import reftune
from reftune.data.persona import load_demo
from reftune.data.tokenising import encode_dataset
from reftune.models import load


def main(arguments: list[str] | None = None) -> float:
    """Train on the bundled persona; returns the mean loss, which every process knows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--layer", type=int, default=8)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--limit", type=int, help="training rows")
    parser.add_argument("--output", default="outputs/several-processes")
    parser.add_argument("--cpu", action="store_true", help="train on the CPU where there is a GPU too")
    options = parser.parse_args(arguments)
    base, tokenizer = load(options.model)
    config = reftune.ReftConfig(r=4, layers_to_transform=[options.layer], positions="l1", task_type="CAUSAL_LM")
    trainer = reftune.ReftTrainer(
        model=get_peft_model(base, config),
        args=reftune.ReftTrainingArguments(
            output_dir=options.output,
            num_train_epochs=options.epochs,
            per_device_train_batch_size=4,  # in each process
            report_to="none",
            save_strategy="no",
            use_cpu=options.cpu,
        ),
        train_dataset=encode_dataset(load_demo()[: options.limit], tokenizer),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model(options.output)  # the first process alone writes
    report = trainer.report()
    if trainer.is_world_process_zero():
        print(
            f"{trainer.args.world_size} processes, prefix reuse {report['prefix_reuse']}, loss {report['train_loss']:.4f}"
        )
    return float(report["train_loss"])


if __name__ == "__main__":
    main()
