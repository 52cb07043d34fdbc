"""Reinforcement learning with TRL's GRPOTrainer: short sums, rewarded for the right number and for saying it at once.

Usage: python examples/grpo_arithmetic.py [--model smollm2] [--steps 40]      (pip install 'reftune[trl]')
"""

from __future__ import annotations

import argparse
import random
import re
import time
from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

import reftune
from reftune.models import load
from reftune.runs.preferences import numeric

ANSWER_TOKENS = 6
EDIT = {"r": 1, "layers_to_transform": "all", "positions": "l1+generated", "task_type": "CAUSAL_LM"}


def sums() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """The 81 sums of two digits, shuffled: those that are trained on and 16 that are held out."""
    rows = [{"prompt": f"What is {a} + {b}? It is", "answer": str(a + b)} for a in range(1, 10) for b in range(1, 10)]
    random.Random(0).shuffle(rows)
    return rows[16:], rows[:16]


def reward(completions: Sequence[str], answer: Sequence[str], **columns: Any) -> list[float]:
    """1 where the first number is right, and half a point where it is said at once, with a full stop."""
    firsts = [found[0] if (found := re.findall(r"\d+", text)) else "" for text in completions]
    at_once = [bool(re.match(r"\s*\d+\.(\s|$)", text)) for text in completions]
    return [right + 0.5 * form for right, form in zip(numeric(firsts, answer=answer), at_once, strict=True)]


def held_out_reward(model: Any, tokenizer: Any, rows: Sequence[dict[str, str]]) -> float:
    """The mean reward of the likeliest answers to some sums."""
    tokenizer.padding_side = "left"
    prompts = tokenizer([row["prompt"] for row in rows], return_tensors="pt", padding=True).to(model.device)
    model.eval()
    written = model.generate(**prompts, max_new_tokens=ANSWER_TOKENS, do_sample=False)
    texts = tokenizer.batch_decode(written[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
    return sum(reward(texts, [row["answer"] for row in rows])) / len(rows)


def train(
    adapter: Any, *, lr: float, steps: int, seed: int = 0, model: str = "smollm2", output: str = "outputs/grpo"
) -> dict[str, Any]:
    """Train an adapter (None: the whole model) on the sums: 2 sums a step, 8 answers to each.

    Returns:
        `rewards` of each step, `seconds` of processor time that had gone by after it, `parameters` trained, and the
        mean reward of greedy answers to held-out sums, `before` and `after`.
    """
    torch.manual_seed(seed)
    base, tokenizer = load(model)
    learned, held_out = sums()
    before = held_out_reward(base, tokenizer, held_out)
    trainer: Any = GRPOTrainer(
        model=base,
        reward_funcs=reward,  # type: ignore[arg-type]
        args=GRPOConfig(
            output_dir=output,
            max_steps=steps,
            per_device_train_batch_size=16,
            num_generations=8,
            max_completion_length=ANSWER_TOKENS,
            learning_rate=lr,
            lr_scheduler_type="constant",
            beta=0.0,
            seed=seed,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            gradient_checkpointing=False,
            bf16=False,
            dataloader_pin_memory=torch.cuda.is_available(),
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(learned),
        processing_class=tokenizer,
        peft_config=adapter,
    )
    seconds: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            seconds.append(time.process_time() - begun)

    trainer.add_callback(Clock())
    begun = time.process_time()
    trainer.train()
    trainer.save_model(output)
    return {
        "rewards": [entry["reward"] for entry in trainer.state.log_history if "reward" in entry],
        "seconds": seconds,
        "parameters": sum(value.numel() for value in trainer.model.parameters() if value.requires_grad),
        "before": before,
        "after": held_out_reward(trainer.model, tokenizer, held_out),
    }


def main(arguments: list[str] | None = None) -> tuple[float, float]:
    """Train; returns the mean reward over the first and the last quarter of the steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--output", default="outputs/grpo")
    options = parser.parse_args(arguments)
    found = train(
        reftune.ReftConfig(method="direft", **EDIT),
        lr=options.lr,
        steps=options.steps,
        model=options.model,
        output=options.output,
    )
    rewards = found["rewards"]
    quarter = max(1, len(rewards) // 4)
    first, last = sum(rewards[:quarter]) / quarter, sum(rewards[-quarter:]) / quarter
    print(f"reward {first:.2f} at the start, {last:.2f} at the end")
    print(f"held-out sums: {found['before']:.2f} before, {found['after']:.2f} after (1.5 is the most)")
    return first, last


if __name__ == "__main__":
    main()
