"""`ReftTrainer`: transformers' Trainer with supervised logits only, exact resume, and checkpoints that are whole."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from accelerate.utils.operations import recursively_apply
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers.trainer_utils import has_length

from reftune.data.collating import CompletionCollator
from reftune.data.tokenising import REJECTED
from reftune.errors import ReftuneError
from reftune.training.arguments import OBJECTIVES, ReftTrainingArguments
from reftune.training.loss import IGNORED_LABEL, completion_loss
from reftune.training.objectives import ReftR1, reps
from reftune.training.prefix.store import PrefixStore
from reftune.training.prefix.switch import PrefixSwitch
from reftune.training.prompt_ends import with_prompt_ends
from reftune.training.resumable import ResumableTrainer
from reftune.training.row_lengths import check_row_lengths
from reftune.training.sampling import LengthGroupedByEpoch, row_lengths
from reftune.training.supervised_logits import (
    SupervisedLogitsError,
    plain_model,
    unsupported_reason,
)

logger = logging.getLogger(__name__)


class ReftTrainer(ResumableTrainer):
    """Trains an adapter: everything that transformers' Trainer takes and does, and a few things more.

    - the loss is computed from logits at supervised positions alone (``args.supervised_logits_only``), equal to the
      model's own; a model that cannot (an encoder-decoder, say) takes the plain path, the reason logged once;
    - ``train(resume_from_checkpoint=True)`` takes the newest complete checkpoint and goes on bit for bit, in the middle
      of an epoch or of a logging interval too (with prefix reuse to rounding, because what was stored is computed again
      beside other rows; bit for bit under ``args.full_determinism``);
    - Ctrl-C saves a checkpoint and raises `KeyboardInterrupt`; a full disk raises `ReftuneError` and leaves the earlier
      checkpoints whole;
    - input embeddings are never made to require gradients, so that nothing below the first edited layer runs backward;
    - ``report()`` says what training came to.

    Args:
        model: a `PeftModel` with a ReFT adapter, or any other that Trainer takes.
        args: `ReftTrainingArguments`; plain `TrainingArguments` get the supervised logits too.
        data_collator: by default `CompletionCollator`, padding with the tokenizer's pad token on the right.
        prefix_store: a store that several trainings in this process share, left open at the end; ``prefix_cache_gib``
            has no meaning then. None: one of this training's own.
        **kwargs: Trainer's other arguments.

    Raises:
        ReftuneError: arguments that do not fit one another, rows or model.
    """

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        data_collator: Any = None,
        processing_class: Any = None,
        prefix_store: PrefixStore | None = None,
        **kwargs: Any,
    ) -> None:
        if args is None:
            args = ReftTrainingArguments(output_dir="reft-output")
        if data_collator is None and getattr(processing_class, "pad_token_id", None) is not None:
            data_collator = CompletionCollator(processing_class.pad_token_id)
        if (
            isinstance(model, nn.Module)
            and not hasattr(model, "hf_device_map")
            and any(p.is_meta for p in model.parameters())
        ):
            raise ReftuneError(
                "This model's weights are offloaded without a device map, and Trainer would move them: load it with "
                "device_map=... (or dispatch_model) in place of cpu_offload or disk_offload."
            )
        self._sampler: LengthGroupedByEpoch | None = None
        self._plain_reasons: dict[int, str | None] = {}
        self._all_logits = False
        super().__init__(
            model=model, args=args, data_collator=data_collator, processing_class=processing_class, **kwargs
        )
        evaluated = self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
        for rows in (self.train_dataset, *evaluated):
            check_row_lengths(self.model, rows)
        self.prefixes = self._prefix_switch(prefix_store)
        self._r1 = self._begin_objective()

    # Loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of one batch, in training and evaluation alike (see `completion_loss` and `supervised_forward`)."""
        inputs = with_prompt_ends(model, inputs)
        objective = getattr(self.args, "objective", "completion")
        if objective == "reps" or (objective == "reft-r1" and model.training):
            loss, outputs = self._pair_loss(model, inputs, num_items_in_batch)
            return (loss, outputs) if return_outputs else loss
        if objective == "reft-r1":  # in evaluation, the positive answers' loss under the edit as it is saved
            inputs = {name: value[: len(value) // 2] for name, value in inputs.items()}
        if not model.training:  # a batch's own mean, which Trainer weighs by its rows, on any number of processes
            num_items_in_batch = None
        if not self._uses_supervised_logits(model, inputs):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        try:
            found = self.prefixes.forward(model, inputs)
        except SupervisedLogitsError as error:
            self._go_plain(model, str(error))
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss = completion_loss(found.logits, found.targets, self.args.label_smoothing_factor, num_items_in_batch)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # Gradients are averaged over processes, though the sum was divided by the tokens of all of them.
            loss = loss * self._data_processes
        return (loss, found.outputs) if return_outputs else loss

    def _pair_loss(self, model: nn.Module, inputs: dict[str, Any], items: Tensor | int | None) -> tuple[Tensor, Any]:
        if not self._uses_supervised_logits(model, inputs):
            raise ReftuneError(
                f"objective={self.args.objective!r} needs logits at supervised positions, which this model or its "
                f"settings do not give ({self._plain_reasons.get(id(plain_model(model))) or 'asked for'})."
            )
        if self._r1 is not None:
            return self._r1(model, inputs, items, self.state.global_step / max(self.state.max_steps, 1))
        losses, outputs = reps(model, inputs, self.prefixes.forward, self.args.factors)
        return losses.sum() / (items if model.training and items is not None else len(losses)), outputs

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """Trainer's; of pairs, of which each counts once however long, their number; none of a classifier's rows.

        A classifier's loss is the mean of its rows already, and would be multiplied by processes and micro-batches.
        """
        if getattr(self.args, "objective", "completion") == "reps":
            return sum(len(batch["labels"]) // 2 for batch in batch_samples)
        labels = batch_samples[0].get("labels") if batch_samples and isinstance(batch_samples[0], dict) else None
        if isinstance(labels, Tensor) and labels.ndim == 1:
            return None
        return super()._get_num_items_in_batch(batch_samples, device)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's batches of a step, without the rows that fill up several processes' last one."""
        batches, items = super().get_batch_samples(*args, **kwargs)
        labels = batches[-1].get("labels") if batches and isinstance(batches[-1], dict) else None
        if self._data_processes == 1 or not isinstance(labels, Tensor) or labels.ndim != 2:
            return batches, items
        if (own := self._own_rows(len(labels))) is None:
            return batches, items
        batches[-1] = _first_rows(batches[-1], len(labels), own)
        return batches, items if items is None else self._get_num_items_in_batch(batches, self.args.device)

    def _begin_objective(self) -> ReftR1 | None:
        """Refuse what an objective on pairs cannot be trained with.

        Raises:
            ReftuneError: rows that are no pairs, several processes, or checkpointed activations.
        """
        objective = getattr(self.args, "objective", "completion")
        if objective == "completion":
            return None
        said = f"objective={objective!r}"
        if objective not in OBJECTIVES:
            raise ReftuneError(f"{said}: must be one of {', '.join(OBJECTIVES)}.")
        if not self.args.factors or not all(factor > 0 for factor in self.args.factors):
            raise ReftuneError(f"factors={self.args.factors}: give numbers above 0.")
        if self.args.gradient_checkpointing or self.accelerator.num_processes > 1:
            raise ReftuneError(f"{said} is not possible with gradient checkpointing or on several processes.")
        if REJECTED + "input_ids" not in (getattr(self.train_dataset, "column_names", None) or ()):
            raise ReftuneError(f"{said} needs pairs of answers, as `Encoding.pairs` tokenises them.")
        if objective == "reps":
            if self.args.full_determinism:
                self.prefixes.switch_off("two answers share a prompt, whose last digits depend on which comes first")
            return None
        self.prefixes.switch_off("reft-r1 looks at all edited tokens of a row at once")
        return ReftR1(self.model)

    def _prefix_switch(self, store: PrefixStore | None) -> PrefixSwitch:
        evaluated = self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
        streamed = self.train_dataset is not None and not has_length(self.train_dataset)
        budget = getattr(self.args, "prefix_cache_gib", None)
        switch = PrefixSwitch(
            getattr(self.args, "prefix_reuse", "auto"),
            0.0 if streamed and budget is None else budget,  # a row that is met once is not worth keeping
            [] if streamed else [self.train_dataset, *evaluated],
            store=store,
            alone=self.args.full_determinism,
        )
        if self.args.neftune_noise_alpha:
            switch.switch_off("NEFTune changes the embeddings in every step")
        return switch

    def _uses_supervised_logits(self, model: nn.Module, inputs: Mapping[str, Any]) -> bool:
        labels = inputs.get("labels")
        if not getattr(self.args, "supervised_logits_only", True) or self.compute_loss_func is not None:
            return False
        if self._all_logits or not isinstance(labels, Tensor) or labels.ndim != 2 or "shift_labels" in inputs:
            return False
        key = id(plain_model(model))
        if key not in self._plain_reasons:
            self._plain_reasons[key] = None
            if (reason := unsupported_reason(model)) is not None:
                self._go_plain(model, reason)
        return self._plain_reasons[key] is None

    def _go_plain(self, model: nn.Module, reason: str) -> None:
        self._plain_reasons[id(plain_model(model))] = reason
        if self.prefixes.status == "on":
            self.prefixes.switch_off(reason)
        logger.warning("Logits are computed at every position, not only where they are learned: %s.", reason)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """One forward and backward; its tokens are counted."""
        self.throughput.count(inputs)
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self._r1 is not None:
            self._r1.keep_strength(first=self.state.global_step == 0)
        return loss

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        """Trainer's; where metrics are wanted, the logits of every position are computed for them.

        Of several processes each gives the mean loss of all their batches, in which no row counts twice.
        """
        self._all_logits = not prediction_loss_only
        labels: Any = inputs.get("labels")
        shared = self._data_processes > 1 and isinstance(labels, Tensor) and labels.ndim > 0
        held = len(labels) if shared else 0
        own = self._own_rows(held) if shared else None
        if own is not None:
            inputs = _first_rows(inputs, held, own)
        try:
            loss, *others = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        finally:
            self._all_logits = False
        if shared and loss is not None:
            learned = (inputs["labels"][:, 1:] != IGNORED_LABEL).sum() if labels.ndim == 2 else None
            loss = self._mean_over_processes(loss, max(0, min(held, held if own is None else own)), learned)
        return loss, *(others if own is None else recursively_apply(partial(_filled_up, held=held), others))

    @property
    def _data_processes(self) -> int:
        """Processes with rows of their own; those of tensor parallelism share theirs."""
        return self.accelerator.num_processes // self.get_tp_size()

    def _own_rows(self, held: int) -> int | None:
        """Of several processes' last batch, which is filled up with the first rows: how many are no repetition.

        That may be none, or more than the process holds. None: no process has such a batch.
        """
        state = self.accelerator.gradient_state
        if not state.end_of_dataloader or state.remainder <= 0:
            return None
        return state.remainder - self.accelerator.process_index // self.get_tp_size() * held

    def _mean_over_processes(self, loss: Tensor, rows: int, tokens: Tensor | None) -> Tensor:
        """The mean over the learned tokens, or a classifier's rows, of all processes' batches."""
        count = loss.new_tensor(rows) if tokens is None else tokens.to(loss)
        summed = torch.stack([(loss * count).nan_to_num() if count else torch.zeros_like(loss), count])
        total: Any = self.accelerator.reduce(summed.double(), "sum")
        return (total[0] / total[1]).to(loss)

    def epoch_begins(self) -> None:
        """Choose the epoch's row order (accelerate does so on one process, not through every wrapper on several)."""
        if self._sampler is not None:
            self._sampler.set_epoch(int(self.state.epoch or 0))
        self.prefixes.next_pass()

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        rows = self.train_dataset if train_dataset is None else train_dataset
        self._sampler = None
        if self.args.train_sampling_strategy != "group_by_length" or rows is None or not has_length(rows):
            return super()._get_train_sampler(train_dataset)
        lengths = row_lengths(rows, self.args.length_column_name)
        if lengths is None:
            raise ReftuneError(
                "train_sampling_strategy='group_by_length': the rows have neither input_ids nor a "
                f"{self.args.length_column_name!r} column. Tokenise them first, or use 'random'."
            )
        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        batch_size = self.args.train_batch_size * self.args.gradient_accumulation_steps * self._data_processes
        self._sampler = LengthGroupedByEpoch(lengths, batch_size, seed)
        return self._sampler

    def train_begins(self) -> None:
        """As for `ResumableTrainer`; whether the model gives supervised logits is asked anew."""
        self._plain_reasons.clear()
        self.throughput.copies = self.get_tp_size()
        super().train_begins()

    def report(self) -> dict[str, Any]:
        """What training came to, over all the runs that were resumed to get here.

        Returns:
            What `ResumableTrainer` reports, prefix_reuse ("on", or "off" with the reason) and prefix_store (entries,
            bytes, hits).
        """
        reuse = {"prefix_reuse": self.prefixes.status, "prefix_store": self.prefixes.summary()}
        return {**super().report(), **reuse}


def _first_rows(batch: dict[str, Any], held: int, own: int) -> dict[str, Any]:
    """A batch's own rows, without those that fill it up.

    One row stays in any case, of which nothing is learned: every process takes part in a step.
    """
    keep = min(max(own, 1), held)
    kept = {k: v[:keep] if isinstance(v, Tensor) and v.shape[:1] == (held,) else v for k, v in batch.items()}
    if own <= 0 and kept["labels"].ndim == 2:
        kept["labels"] = torch.full_like(kept["labels"], IGNORED_LABEL)
    return kept


def _filled_up(output: Tensor, held: int) -> Tensor:
    """Outputs of a batch's own rows, the last again and again behind them: gathered, all processes have as many."""
    return output[torch.arange(held, device=output.device).clamp(max=len(output) - 1)] if output.ndim else output
