"""Carry out a recipe with `task: completion`: read, tokenise, attach, train, and write the output folder."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import transformers
from peft import PeftModel, get_peft_model
from rich.console import Console

from reftune import models
from reftune.data.formats import Example, read_examples
from reftune.data.splitting import split_rows
from reftune.runs.fingerprint import base_digest, fingerprint
from reftune.runs.output_folder import check_output, held_output
from reftune.runs.recipe import DEMO_DATA, TrainRecipe
from reftune.runs.steps import TrainedRun, begin_training, train_until_done, training_arguments, write_results
from reftune.training.row_lengths import check_row_lengths
from reftune.training.trainer import ReftTrainer


def run_completion(recipe: TrainRecipe, console: Console) -> TrainedRun:
    """Train on completions as the recipe says and write the output folder; errors as for `run_training`."""
    place = check_output(recipe)
    train_rows, eval_rows = read_data(recipe)
    transformers.set_seed(recipe.seed)
    name = recipe.full_path("model")  # a relative folder in the adapter's configuration would be found from here alone
    base, tokenizer = models.load(name, recipe.dtype, recipe.device, quantization=recipe.quantization)
    digest = base_digest(base)
    model = get_peft_model(base, recipe.adapter_config())
    if not isinstance(model, PeftModel):
        raise TypeError(f"get_peft_model returned a {type(model).__name__}")
    train_set, eval_set = (encode_rows(rows, recipe, tokenizer) for rows in (train_rows, eval_rows))
    for rows in (train_set, eval_set):
        check_row_lengths(model, rows)
    with held_output(recipe, place):
        trainer = ReftTrainer(
            model=model,
            args=training_arguments(recipe, place.folder, len(train_set), bool(eval_rows)),
            train_dataset=train_set,
            eval_dataset=eval_set,
            processing_class=tokenizer,
        )
        begin_training(recipe, place, trainer, fingerprint(train_set, eval_set, digest), console)
        train_until_done(trainer, recipe, place)
        metrics = {**trainer.report(), "train_rows": len(train_rows), "eval_rows": len(eval_rows)}
        return write_results(recipe, place, trainer, metrics, tokenizer)


def read_data(recipe: TrainRecipe) -> tuple[list[Example], list[Example]]:
    """The training rows and the held-out rows (none where the recipe asks for none)."""

    def read(source: str) -> list[Example]:
        columns = recipe.columns if isinstance(recipe.columns, dict) else None
        if source == DEMO_DATA and not Path(source).exists():
            with resources.as_file(resources.files("reftune.data") / "demo_persona.jsonl") as file:
                return read_examples(file, limit=recipe.limit_rows)
        return read_examples(source, columns=columns, split=recipe.split, limit=recipe.limit_rows)

    rows = read(recipe.train_file)
    held_out = read(recipe.eval_file) if recipe.eval_file else None
    return split_rows(rows, eval_fraction=recipe.eval_fraction, eval_rows=held_out, seed=recipe.seed)


def encode_rows(rows: list[Example], recipe: TrainRecipe, tokenizer: Any) -> Any:
    """Rows as the trainer takes them, in order; None where there are none."""
    if not rows:
        return None
    return recipe.encoding(tokenizer).dataset(rows, progress=len(rows) > 2000)
