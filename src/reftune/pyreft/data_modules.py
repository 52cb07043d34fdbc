"""pyreft's ``make_*_supervised_data_module``: a training dataset and its collator from lists of prompts and outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from transformers import DataCollatorForSeq2Seq

from reftune.pyreft.collating import ReftDataCollator
from reftune.pyreft.encoding import IGNORE_INDEX, encode_pair, labels_of
from reftune.pyreft.locations import get_intervention_locations


class PositionedCollator(ReftDataCollator):
    """A collator that says which positions its rows' locations stand for, so that a trained adapter can record them."""

    positions: str | None = None


def make_multiple_position_supervised_data_module(
    tokenizer: Any,
    model: Any,
    inputs: Sequence[str],
    outputs: Sequence[str],
    positions: str = "f1+l1",
    num_interventions: int = 1,
    nonstop: bool = False,
    share_weights: bool = False,
) -> dict[str, Any]:
    """Rows edited at the given positions of their prompts.

    Args:
        tokenizer: the base model's.
        model: passed on to transformers' collator.
        inputs: prompts, in the model's template.
        outputs: what is learned.
        positions: ``fN``, ``lN`` or ``fA+lB``.
        num_interventions: number of the model's interventions.
        nonstop: whether to leave out the end token.
        share_weights: whether prefix and suffix share their interventions.

    Returns:
        ``train_dataset``, ``eval_dataset`` (None) and ``data_collator``, as a trainer's keyword arguments.

    Raises:
        ReftuneError: positions that do not parse, or an odd number of untied interventions.
    """
    rows: dict[str, list[Any]] = {"input_ids": [], "intervention_locations": [], "labels": []}
    for prompt, output in zip(inputs, outputs, strict=True):
        ids, length = encode_pair(tokenizer, prompt, output if nonstop else f"{output}{tokenizer.eos_token}")
        rows["input_ids"].append(ids)
        rows["labels"].append(labels_of(ids, length))
        rows["intervention_locations"].append(
            get_intervention_locations(
                last_position=length,
                positions=positions,
                num_interventions=num_interventions,
                share_weights=share_weights,
            )
        )
    inner = DataCollatorForSeq2Seq(tokenizer=tokenizer, model=model, label_pad_token_id=IGNORE_INDEX, padding="longest")
    collator = PositionedCollator(data_collator=inner)
    collator.positions = positions
    return {"train_dataset": Dataset.from_dict(rows), "eval_dataset": None, "data_collator": collator}


def make_last_position_supervised_data_module(
    tokenizer: Any,
    model: Any,
    inputs: Sequence[str],
    outputs: Sequence[str],
    num_interventions: int = 1,
    nonstop: bool = False,
) -> dict[str, Any]:
    """Rows edited at the last token of their prompts; arguments and result as of the function for several positions."""
    return make_multiple_position_supervised_data_module(
        tokenizer, model, inputs, outputs, "l1", num_interventions, nonstop, share_weights=True
    )
