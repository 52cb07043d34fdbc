"""Everything that can be known to be wrong before the first run starts, so that no night is lost to a typing error."""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from reftune import models
from reftune.comparison.methods import attach_method, judged_rows, prompt_encoding
from reftune.comparison.recipe import CompareRecipe
from reftune.comparison.results import data_digest
from reftune.data.formats import Example
from reftune.data.persona import neutral_rows
from reftune.data.tokenising import Encoding
from reftune.errors import ReftuneError
from reftune.evaluation.judging import load_judge
from reftune.evaluation.options import read_option_rows
from reftune.evaluation.side_effects import read_refusal_rows, refusal_prompts
from reftune.inference.loading import within_context
from reftune.runs.completion import read_data
from reftune.runs.recipe_values import told_at
from reftune.runs.steps import encode_rows

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checked:
    """A comparison that can run.

    Attributes:
        train, held_out: the rows.
        data: their digest, for fingerprints.
        parameters: trainable parameters by method.
    """

    train: list[Example]
    held_out: list[Example]
    data: str
    parameters: dict[str, int]


def check_comparison(recipe: CompareRecipe) -> Checked:
    """Read and tokenise the data, and put every method on the model's skeleton, which takes no memory.

    Raises:
        ReftuneError: a file or row that cannot be used, a layer, module or rank that the model does not have, a prompt
            that leaves no room for an answer.
    """
    train, held_out = read_data(recipe.shared)
    skeleton, tokenizer = _skeleton(recipe)
    for rows in (train, held_out):
        encode_rows(rows, recipe.shared, tokenizer)
    context = within_context(recipe.shared.encoding(tokenizer), skeleton)
    _check_room(recipe, held_out, context)
    _check_side_effects(recipe, context)
    for method, seed in recipe.runs():
        if (own := prompt_encoding(method, context, train, seed)).before:
            judged_rows(method, held_out, recipe.shared, tokenizer, own)
            with told_at(method.name):
                _check_room(recipe, held_out, own)
                _check_side_effects(recipe, own)
    parameters: dict[str, int] = {}
    for method in recipe.methods:
        adapted = attach_method(method, copy.deepcopy(skeleton), tokenizer)
        parameters[method.name] = sum(p.numel() for p in adapted.model.parameters() if p.requires_grad)
    _check_options(recipe)
    if recipe.judge is not None:
        load_judge(recipe.judge)
    return Checked(train, held_out, data_digest(train, held_out), parameters)


def _check_options(recipe: CompareRecipe) -> None:
    if recipe.options is None:
        return
    rows = read_option_rows(recipe.options)
    if not rows:
        raise ReftuneError(f"options={recipe.options!r}: the file has no rows.")
    for row in rows:
        if row.answer is None:
            raise ReftuneError(f"{row.where}: field 'answer' is missing; accuracy needs the right option of every row.")


def _check_side_effects(recipe: CompareRecipe, encoding: Encoding) -> None:
    if recipe.side_effects:
        neutral = neutral_rows(recipe.neutral_file)
        encoding.dataset(neutral)
        refusals = read_refusal_rows(recipe.refusal_file) if recipe.refusal_file else []
        _check_room(replace(recipe, generate=-1), [*neutral, *refusal_prompts(refusals)], encoding)


def _check_room(recipe: CompareRecipe, held_out: list[Example], encoding: Encoding) -> None:
    asked = held_out if recipe.generate < 0 else held_out[: recipe.generate]
    if not asked or encoding.limit is None:
        return
    for row, ids in zip(asked, encoding.prompt_ids(asked), strict=True):
        if len(ids) + recipe.max_new_tokens > encoding.limit:
            raise ReftuneError(
                f"{row.where or 'a held-out row'}: the prompt has {len(ids)} tokens; with max_new_tokens="
                f"{recipe.max_new_tokens} that is more than the model's {encoding.limit}: lower max_new_tokens, or set "
                "generate to fewer rows."
            )


def _skeleton(recipe: CompareRecipe) -> tuple[Any, Any]:
    """The base model without its weights, and its tokenizer."""
    name = recipe.shared.full_path("model")
    place = str(models.bundled_folder()) if name == models.BUNDLED else name
    if not place.lower().endswith(".gguf"):
        try:
            config = AutoConfig.from_pretrained(place, trust_remote_code=False)
            tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
            if tokenizer.pad_token_id is None:
                tokenizer.pad_token = tokenizer.eos_token
            models.limit_to_context(tokenizer, model)
            return model, tokenizer
        except Exception:  # loading it whole says better what is wrong, or works
            logger.debug("no skeleton of %s", name, exc_info=True)
    model, tokenizer = models.load(name, recipe.shared.dtype, "cpu")
    return model.to("meta"), tokenizer  # type: ignore[arg-type]
