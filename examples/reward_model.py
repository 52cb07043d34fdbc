"""A reward model from pairs of answers: edits and a head of one output, trained to score the chosen answer higher.

Usage: python examples/reward_model.py [--model smollm2] [--layer 8] [--epochs 10]
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
import torch.nn.functional as F
from transformers import TrainingArguments

import reftune.pyreft as pyreft
from reftune.models import load

PAIRS = [
    ("How do I boil an egg?", "Put it in boiling water for eight minutes.", "Eggs are eggs."),
    ("Where do owls sleep?", "In hollow trees, and by day.", "I will not say."),
    ("Why is the sky blue?", "Air scatters blue light the most.", "Because."),
    ("How far is the moon?", "About 384,000 kilometres.", "Far."),
]


class RewardTrainer(pyreft.ReftTrainer):
    """Rows come in pairs, chosen before rejected; the loss is -log sigmoid of the difference of their scores."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Bradley-Terry."""
        outputs = model(**inputs)
        scores = outputs.logits[:, 0]
        loss = -F.logsigmoid(scores[0::2] - scores[1::2]).mean()
        return (loss, outputs) if return_outputs else loss


def main(arguments: list[str] | None = None) -> float:
    """Train; returns the share of pairs in which the chosen answer scores higher."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--layer", type=int, default=8)
    parser.add_argument("--epochs", type=float, default=10)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    model, tokenizer = load(options.model, task="seq_cls", num_labels=1)

    config = pyreft.ReftConfig(
        representations={
            "layer": options.layer,
            "component": "block_output",
            "low_rank_dimension": 4,
            "intervention": pyreft.LoreftIntervention(embed_dim=model.config.hidden_size, low_rank_dimension=4),
        }
    )
    reft_model = pyreft.get_reft_model(model, config)
    for parameter in model.score.parameters():  # the head is new, so it trains too
        parameter.requires_grad = True
    reft_model.print_trainable_parameters()

    def turns(question: str, answer: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    rows = [{"prompt": q, "a": turns(q, good), "b": turns(q, bad)} for q, good, bad in PAIRS]
    dataset = pyreft.ReftRewardDataset(
        "pairs", None, tokenizer, dataset=rows, conv_A_field="a", conv_B_field="b", prompt_field="prompt", position="l1"
    )
    collator = pyreft.ReftRewardCollator(tokenizer)
    RewardTrainer(
        model=reft_model,
        args=TrainingArguments(
            output_dir="outputs/reward",
            num_train_epochs=options.epochs,
            per_device_train_batch_size=4,
            learning_rate=2e-3,
            report_to=[],
            save_strategy="no",
        ),
        train_dataset=dataset,
        data_collator=collator,
        processing_class=tokenizer,
    ).train()

    reft_model.eval()
    with torch.no_grad():
        scores = reft_model(**collator([dataset[i] for i in range(len(dataset))])).logits[:, 0]
    share = (scores[0::2] > scores[1::2]).float().mean().item()
    print(f"the chosen answer scores higher in {share:.0%} of the pairs")
    return share


if __name__ == "__main__":
    main()
