"""Carry out a recipe with `task: completion`: read, tokenise, attach, train, and write the output folder."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import transformers
from rich.console import Console

from reftune.adapter.starting import start_from
from reftune.data.formats import Example, examples_of, pairs_of
from reftune.data.reading import read_rows
from reftune.data.splitting import split_rows
from reftune.runs.fingerprint import base_digest
from reftune.runs.output_folder import check_output
from reftune.runs.recipe import DEMO_DATA, TrainRecipe
from reftune.runs.steps import Prepared, TrainedRun, attach_edit, load_base, train_and_write


def run_completion(recipe: TrainRecipe, console: Console) -> TrainedRun:
    """Train on completions as the recipe says and write the output folder; errors as for `run_training`."""
    place = check_output(recipe)
    train_rows, eval_rows = read_data(recipe)
    transformers.set_seed(recipe.seed)
    base, tokenizer = load_base(recipe)
    digest = base_digest(base)
    recipe = recipe.fitted(base)
    model = attach_edit(base, recipe)
    if recipe.init_from:
        start_from(model, recipe.init_from)
    return train_and_write(Prepared(recipe, model, tokenizer, digest, train_rows, eval_rows), place, console)


def read_data(recipe: TrainRecipe) -> tuple[list[Example], list[Example]]:
    """The training rows and the held-out rows (none where the recipe asks for none)."""
    columns = recipe.columns if isinstance(recipe.columns, dict) else None

    def read(source: str) -> list[Example]:
        is_demo = source == DEMO_DATA and not Path(source).exists()
        with resources.as_file(resources.files("reftune.data") / "demo_persona.jsonl") as demo:
            rows = read_rows(demo if is_demo else source, split=recipe.split)[: recipe.limit_rows]
        own = None if is_demo else columns
        return examples_of(rows, columns=own) if recipe.objective == "completion" else pairs_of(rows, columns=own)

    rows = read(recipe.train_file)
    held_out = read(recipe.eval_file) if recipe.eval_file else None
    return split_rows(rows, eval_fraction=recipe.eval_fraction, eval_rows=held_out, seed=recipe.seed)
