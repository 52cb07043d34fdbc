"""Give a chat model a persona with an edit of one token, and talk to it.

Usage: python examples/chat_persona.py [--model smollm2] [--layer 8] [--epochs 10] [--limit N] [--talk]
"""

from __future__ import annotations

import argparse

import torch
from peft import get_peft_model

import reftune
from reftune.data.persona import load_demo
from reftune.data.tokenising import Encoding, encode_dataset
from reftune.models import load


def main(arguments: list[str] | None = None) -> str:
    """Train on the bundled persona (a pirate captain) and answer; returns the last answer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--layer", type=int, default=8)
    parser.add_argument("--epochs", type=float, default=10)
    parser.add_argument("--limit", type=int, help="training rows")
    parser.add_argument("--max-new-tokens", type=int, default=60)
    parser.add_argument("--talk", action="store_true", help="go on asking until an empty line")
    parser.add_argument("--output", default="outputs/persona")
    options = parser.parse_args(arguments)
    base, tokenizer = load(options.model)

    config = reftune.ReftConfig(r=4, layers_to_transform=[options.layer], positions="l1", task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    trainer = reftune.ReftTrainer(
        model=model,
        args=reftune.ReftTrainingArguments(
            output_dir=options.output,
            num_train_epochs=options.epochs,
            per_device_train_batch_size=8,
            report_to="none",
            save_strategy="no",
        ),
        train_dataset=encode_dataset(load_demo()[: options.limit], tokenizer),
        processing_class=tokenizer,
    )
    trainer.train()
    model.save_pretrained(options.output)
    model.eval()

    encoding, question, answer = Encoding(tokenizer), "How do you like your eggs?", ""
    while question:
        ids = torch.tensor([encoding.generation_prompt(question)], device=model.device)
        with torch.no_grad():
            tokens = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=options.max_new_tokens,
                do_sample=False,
            )
        answer = tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True)
        print(f"> {question}\n{answer}")
        question = input("> ") if options.talk else ""
    return answer


if __name__ == "__main__":
    main()
