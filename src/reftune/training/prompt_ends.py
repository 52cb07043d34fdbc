"""What a batch says about its prompts, in the form that this model takes."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from reftune.engine.forwards import is_causal_lm, token_arguments
from reftune.engine.hooks import ENGINE
from reftune.engine.positions import read_layout
from reftune.training.supervised_logits import plain_model


def takes_prompt_lengths(model: nn.Module) -> bool:
    """Whether a forward of this model accepts ``prompt_lengths``: there is an edit on it that may ask for them."""
    return ENGINE in plain_model(model).__dict__


def with_prompt_ends(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """The batch with its prompt ends said outright, so that the labels can be taken away from the forward.

    Collators other than ours send labels alone; the ends are then read from them, a packed batch's one a document. A
    model without edits (plain, or LoRA for comparison) gets none.
    """
    if not takes_prompt_lengths(model):
        return {name: value for name, value in inputs.items() if name != "prompt_lengths"}
    base = plain_model(model)
    labels = inputs.get("labels")
    if (
        "prompt_lengths" in inputs
        or "intervention_mask" in inputs
        or not isinstance(labels, Tensor)
        or labels.ndim != 2
    ):
        return inputs
    found = token_arguments(inputs, "only", base) if is_causal_lm(base) else None
    if found is None:
        return inputs
    layout = read_layout(**found)
    if layout.prompt_length is None:
        return inputs
    begins = (layout.ordinal == 0) & layout.attended  # the first token of a row, or of each document in it
    return {**inputs, "prompt_lengths": layout.prompt_length.expand_as(layout.ordinal)[begins]}
