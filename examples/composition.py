"""Two skills in one edit, each in directions of its own: learned side by side, used apart, together or the other way.

Usage: python examples/composition.py [--model smollm2] [--layer 8] [--epochs 30]

One rank-8 rotation is shared out: directions 0 to 3 learn to answer in capitals, 4 to 7 to answer with a question.
Every training row names the part that it may use. Afterwards any part can be asked for by itself, and the whole edit
weakened or negated.
"""

from __future__ import annotations

import argparse

import torch
from transformers import DataCollatorForSeq2Seq, TrainingArguments

import reftune.pyreft as pyreft
from reftune.data.templates import render_prompt
from reftune.models import load

CAPITALS, QUESTION = 0, 1
WORDS = {"a cat": "purrs", "the sea": "roars", "bread": "rises", "a bell": "rings", "snow": "melts", "a door": "creaks"}


def rows(tokenizer) -> list[dict]:
    """Training rows in ReftRawDataset's columns; `subspaces` names the part of the rotation."""
    found = []
    for thing, verb in WORDS.items():
        prompt = render_prompt(f"What does {thing} do?", tokenizer)
        found.append({"instruction": prompt, "output": f"IT {verb.upper()}.", "subspaces": [CAPITALS]})
        found.append({"instruction": prompt, "output": f"It {verb}. What do you think?", "subspaces": [QUESTION]})
    return found


def main(arguments: list[str] | None = None) -> dict[str, str]:
    """Train and answer one prompt under every combination; returns the answers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--layer", type=int, default=8)
    parser.add_argument("--epochs", type=float, default=30)
    parser.add_argument("--max-new-tokens", type=int, default=16)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    model, tokenizer = load(options.model)

    config = pyreft.ReftConfig(
        representations={
            "layer": options.layer,
            "component": "block_output",
            "low_rank_dimension": 8,
            "subspace_partition": [[0, 4], [4, 8]],
            "intervention": pyreft.LoreftIntervention(
                embed_dim=model.config.hidden_size, low_rank_dimension=8, init="identity"
            ),
        }
    )
    reft_model = pyreft.get_reft_model(model, config)
    dataset = pyreft.ReftRawDataset("skills", None, tokenizer, dataset=rows(tokenizer), position="l1")
    trainer = pyreft.ReftTrainerForCausalLM(
        model=reft_model,
        args=TrainingArguments(
            output_dir="outputs/composition",
            num_train_epochs=options.epochs,
            per_device_train_batch_size=6,
            learning_rate=1e-2,
            report_to=[],
            save_strategy="no",
        ),
        train_dataset=dataset,
        data_collator=pyreft.ReftDataCollator(DataCollatorForSeq2Seq(tokenizer)),
        processing_class=tokenizer,
    )
    trainer.train()

    prompt = tokenizer(render_prompt("What does a dog do?", tokenizer), return_tensors="pt", add_special_tokens=False)
    last = [[[prompt["input_ids"].shape[1] - 1]]]
    answers = {}
    for name, parts, scale in (
        ("neither", [], 1.0),
        ("capitals", [CAPITALS], 1.0),
        ("question", [QUESTION], 1.0),
        ("both", [CAPITALS, QUESTION], 1.0),
        ("both, half", [CAPITALS, QUESTION], 0.5),
        ("capitals, negated", [CAPITALS], -1.0),
    ):
        reft_model.set_scale(scale)
        _, tokens = reft_model.generate(
            prompt,
            unit_locations={"sources->base": (None, last)},
            subspaces=[[parts]],
            intervene_on_prompt=True,
            max_new_tokens=options.max_new_tokens,
            do_sample=False,
        )
        answers[name] = tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
        print(f"{name:>18}: {answers[name]}")
    return answers


if __name__ == "__main__":
    main()
