"""The first ReFT script of many people, from a Japanese blog post, with pyreft's import line changed and nothing else.

Usage: python examples/seed_script.py --model MODEL --csv FILE [--epochs N] [--learning-rate X] ...

FILE has the columns prompt and completion. MODEL is a Llama-3 model (the post used rinna/llama-3-youko-8b on a T4), or
`smollm2`, the small model that comes with this library. The chat header is Llama 3's unless the model has a chat
template of another kind.
"""

from __future__ import annotations

import argparse
import csv
import random

import torch
import transformers

import reftune.pyreft as pyreft

LLAMA_3_TEMPLATE = (
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n%s<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)


def prompt_template(tokenizer) -> str:
    """The chat header around a prompt: one `%s`."""
    if "<|start_header_id|>" in tokenizer.get_vocab() or not tokenizer.chat_template:
        return LLAMA_3_TEMPLATE
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "PROMPT"}], tokenize=False, add_generation_prompt=True
    )
    return text.replace("%", "%%").replace("PROMPT", "%s")


def load(name: str, device: str):
    """The model and its tokenizer, as the post loads them (the bundled model through reftune)."""
    if name == "smollm2":
        import reftune.models

        return reftune.models.load(name, device=device)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=dtype, device_map=device)
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        name, model_max_length=2048, padding_side="right", use_fast=False
    )
    tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def main(arguments: list[str] | None = None) -> list[str]:
    """Train on a sample of the rows and answer held-out ones; returns the answers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--csv", required=True)
    parser.add_argument("--rows", type=int, default=20, help="training rows")
    parser.add_argument("--held-out", type=int, default=3, help="rows to answer afterwards")
    parser.add_argument("--layer", type=int, default=8)
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--accumulate", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--max-new-tokens", type=int, default=512)
    parser.add_argument("--output", default="outputs")
    options = parser.parse_args(arguments)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with open(options.csv, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    random.Random(0).shuffle(rows)
    training, held_out = rows[: options.rows], rows[options.rows : options.rows + options.held_out]

    model, tokenizer = load(options.model, device)
    template = prompt_template(tokenizer)

    data_module = pyreft.make_last_position_supervised_data_module(
        tokenizer,
        model,
        [template % row["prompt"] for row in training],
        [row["completion"] for row in training],
    )
    reft_config = pyreft.ReftConfig(
        representations={
            "layer": options.layer,
            "component": "block_output",
            "low_rank_dimension": 4,
            "intervention": pyreft.LoreftIntervention(embed_dim=model.config.hidden_size, low_rank_dimension=4),
        }
    )
    reft_model = pyreft.get_reft_model(model, reft_config)
    reft_model.set_device(device)
    reft_model.print_trainable_parameters()

    training_args = transformers.TrainingArguments(
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.accumulate,
        warmup_steps=options.warmup,
        num_train_epochs=options.epochs,
        learning_rate=options.learning_rate,
        logging_steps=1,
        optim="paged_adamw_32bit",
        weight_decay=0.0,
        lr_scheduler_type="cosine",
        output_dir=options.output,
        report_to=[],
    )
    trainer = pyreft.ReftTrainerForCausalLM(model=reft_model, tokenizer=tokenizer, args=training_args, **data_module)
    trainer.train()
    reft_model.set_device(device)
    reft_model.save(options.output)

    answers = []
    for row in held_out:
        prompt = tokenizer(template % row["prompt"], return_tensors="pt").to(device)
        last_position = prompt["input_ids"].shape[-1] - 1
        _, response = reft_model.generate(
            prompt,
            unit_locations={"sources->base": (None, [[[last_position]]])},
            intervene_on_prompt=True,
            max_new_tokens=options.max_new_tokens,
            do_sample=True,
            eos_token_id=tokenizer.eos_token_id,
            early_stopping=True,
        )
        answers.append(tokenizer.decode(response[0, last_position + 1 :], skip_special_tokens=True))
        print(f"{row['prompt']}\n  {answers[-1]}")
    return answers


if __name__ == "__main__":
    main()
