"""Carry out a recipe with `task: completion`: read, tokenise, attach, train, and write the output folder."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Any

import transformers
from rich.console import Console

from reftune.adapter.starting import start_from
from reftune.data.formats import Example, examples_of, pairs_of
from reftune.data.reading import read_rows, stream_rows
from reftune.data.splitting import split_rows
from reftune.runs.fingerprint import base_digest
from reftune.runs.output_folder import check_output
from reftune.runs.processes import from_first
from reftune.runs.recipe import DEMO_DATA, TrainRecipe
from reftune.runs.steps import Prepared, TrainedRun, attach_edit, load_base, train_and_write

_PIECE = 256
"""Rows that are streamed at a time."""


def run_completion(recipe: TrainRecipe, console: Console) -> TrainedRun:
    """Train on completions as the recipe says and write the output folder; errors as for `run_training`."""
    place = from_first("place", lambda: check_output(recipe))
    train_rows, eval_rows = read_data(recipe)
    transformers.set_seed(recipe.seed)
    base, tokenizer = load_base(recipe)
    digest = base_digest(base)
    recipe = recipe.fitted(base)
    model = attach_edit(base, recipe)
    if recipe.init_from:
        start_from(model, recipe.init_from)
    return train_and_write(Prepared(recipe, model, tokenizer, digest, train_rows, eval_rows), place, console)


def read_data(recipe: TrainRecipe) -> tuple[Any, list[Example]]:
    """The training rows and the held-out rows (none where the recipe asks for none); of streamed rows, what reads them.

    That gives the examples from the first on, in lists, each time it is called.
    """
    columns = recipe.columns if isinstance(recipe.columns, dict) else None

    def read(source: str) -> list[Example]:
        is_demo = source == DEMO_DATA and not Path(source).exists()
        with resources.as_file(resources.files("reftune.data") / "demo_persona.jsonl") as demo:
            rows = read_rows(demo if is_demo else source, split=recipe.split)[: recipe.limit_rows]
        own = None if is_demo else columns
        return examples_of(rows, columns=own) if recipe.objective == "completion" else pairs_of(rows, columns=own)

    def stream() -> Iterator[list[Example]]:
        rows = islice(stream_rows(recipe.train_file, split=recipe.split), recipe.limit_rows)
        while piece := list(islice(rows, _PIECE)):
            yield examples_of(piece, columns=columns)

    if recipe.streaming:
        next(stream(), None)  # what is wrong with the first rows is told at once
        return stream, read(recipe.eval_file) if recipe.eval_file else []
    rows = read(recipe.train_file)
    held_out = read(recipe.eval_file) if recipe.eval_file else None
    return split_rows(rows, eval_fraction=recipe.eval_fraction, eval_rows=held_out, seed=recipe.seed)
