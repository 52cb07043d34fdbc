"""pyreft's trainers: this library's, with pyreft's arguments."""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

import torch

from reftune.errors import ReftuneError
from reftune.pyreft.model import ReftModel
from reftune.training.trainer import ReftTrainer as CoreTrainer

logger = logging.getLogger(__name__)

_BITSANDBYTES = ("paged_", "adamw_bnb", "adamw_8bit", "lion_8bit", "ademamix", "rmsprop_bnb")


class ReftTrainer(CoreTrainer):
    """Trains the edits of a ``ReftModel``, and whatever else of it is trainable.

    Args:
        model: what ``get_reft_model`` returned.
        args: transformers' ``TrainingArguments``; **changed**: ``remove_unused_columns`` is switched off, pinned memory
            too without a GPU, and an optimiser of bitsandbytes is replaced by plain AdamW where that or a GPU is
            missing.
        data_collator: the data module's.
        tokenizer: pyreft's name for ``processing_class``.
        processing_class: the tokenizer.
        **kwargs: as for transformers' ``Trainer``.

    Raises:
        ReftuneError: a model that is no ``ReftModel``.
    """

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        data_collator: Any = None,
        tokenizer: Any = None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(model, ReftModel):
            raise ReftuneError(
                f"model is a {type(model).__name__}: pass what get_reft_model returned, or use reftune.ReftTrainer."
            )
        if args is not None:
            args.remove_unused_columns = False
            args.dataloader_pin_memory = args.dataloader_pin_memory and torch.cuda.is_available()
            args.optim = _available_optimiser(str(getattr(args.optim, "value", args.optim)))
        positions = getattr(data_collator, "positions", getattr(kwargs.get("train_dataset"), "positions", None))
        if model.reft_config.positions is None:
            model.reft_config.positions = positions
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            processing_class=processing_class if processing_class is not None else tokenizer,
            **kwargs,
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the edits as an adapter folder; a checkpoint, besides, what resuming needs."""
        if _internal_call:
            super().save_model(output_dir, _internal_call)
        elif self.args.should_save:
            model: Any = self.model
            model.save(output_dir or self.args.output_dir)


class ReftTrainerForCausalLM(ReftTrainer):
    """For causal language models."""


class ReftTrainerForCausalLMDistributed(ReftTrainer):
    """For causal language models on several processes, which the other class does too."""


class ReftTrainerForSequenceClassification(ReftTrainer):
    """For classifiers: their labels are one class a row."""


def _available_optimiser(name: str) -> str:
    if not name.startswith(_BITSANDBYTES):
        return name
    if importlib.util.find_spec("bitsandbytes") is not None and torch.cuda.is_available():
        return name
    logger.warning("optim=%r needs bitsandbytes and a CUDA GPU, which are not here: plain AdamW is used.", name)
    return "adamw_torch"
