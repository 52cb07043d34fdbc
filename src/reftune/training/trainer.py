"""`ReftTrainer`: transformers' Trainer with supervised logits only, exact resume, and checkpoints that are whole."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput, has_length, rotate_checkpoints

from reftune.data.collating import CompletionCollator
from reftune.data.tokenising import REJECTED
from reftune.engine.transformers_names import checkpointing_settings
from reftune.errors import ReftuneError
from reftune.training.arguments import OBJECTIVES, ReftTrainingArguments
from reftune.training.checkpoints import (
    RUN_STATE_NAME,
    UNFINISHED,
    clear_leftovers,
    last_complete_checkpoint,
    publish,
    readable_write_errors,
    require_complete,
    written_files,
)
from reftune.training.interrupts import InterruptCallback
from reftune.training.loss import IGNORED_LABEL, completion_loss
from reftune.training.objectives import ReftR1, reps
from reftune.training.prefix.store import PrefixStore
from reftune.training.prefix.switch import PrefixSwitch
from reftune.training.progress import ProgressBarCallback
from reftune.training.prompt_ends import with_prompt_ends
from reftune.training.row_lengths import check_row_lengths
from reftune.training.sampling import LengthGroupedByEpoch, row_lengths
from reftune.training.sharding import refuse_lost_retractions, retract_shards
from reftune.training.supervised_logits import (
    SupervisedLogitsError,
    plain_model,
    unsupported_reason,
)
from reftune.training.throughput import ThroughputCallback, peak_memory_bytes

logger = logging.getLogger(__name__)


class ReftTrainer(Trainer):
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
    """

    args: Any  # ReftTrainingArguments, or transformers' own
    model: Any
    model_wrapped: Any

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
        self.throughput = ThroughputCallback()
        self._interrupts = InterruptCallback()
        self._progress: ProgressBarCallback | None = None
        self._sampler: LengthGroupedByEpoch | None = None
        self._plain_reasons: dict[int, str | None] = {}
        self._all_logits = False
        self._unfinished: str | None = None
        self._resumed_from: str | None = None
        self._saved_step: int | None = None
        self._loaded_step: int | None = None  # whose checkpoint's weights the model has, since training ended
        self._diverged: Tensor | None = None  # whether a loss was not finite since the last look
        self._loss_before = (0.0, 0)  # summed training loss and steps of the runs that this one resumes
        super().__init__(
            model=model, args=args, data_collator=data_collator, processing_class=processing_class, **kwargs
        )
        evaluated = self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
        for rows in (self.train_dataset, *evaluated):
            check_row_lengths(self.model, rows)
        self.prefixes = self._prefix_switch(prefix_store)
        self._r1 = self._begin_objective()
        for callback in (_TrainBegins(self), self.throughput, self._interrupts):
            self.add_callback(callback)
        if self.pop_callback(ProgressCallback) is not None:
            self._progress = ProgressBarCallback(self.throughput)
            self.add_callback(self._progress)
        self.remove_callback(PrinterCallback)
        self._drop_input_gradients()

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
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
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
        """Trainer's; of pairs, of which each counts once however long, their number."""
        if getattr(self.args, "objective", "completion") == "reps":
            return sum(len(batch["labels"]) // 2 for batch in batch_samples)
        return super()._get_num_items_in_batch(batch_samples, device)

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
        switch = PrefixSwitch(
            getattr(self.args, "prefix_reuse", "auto"),
            getattr(self.args, "prefix_cache_gib", None),
            [self.train_dataset, *evaluated],
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
        wrong = ~torch.isfinite(loss.detach()).all()
        self._diverged = wrong if self._diverged is None else self._diverged | wrong
        return loss

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        """Trainer's; where metrics are wanted, the logits of every position are computed for them."""
        self._all_logits = not prediction_loss_only
        try:
            return super().prediction_step(model, self._without_repeats(inputs), prediction_loss_only, ignore_keys)
        finally:
            self._all_logits = False

    def _without_repeats(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Several processes' last batch without the rows that fill it up, which would count twice.

        accelerate begins again with the first rows there; gathering drops them, but not their share of a batch's loss.
        """
        labels, state = inputs.get("labels"), self.accelerator.gradient_state
        if self.accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return inputs
        if not isinstance(labels, Tensor) or labels.ndim != 2:
            return inputs
        own = state.remainder - self.accelerator.process_index * len(labels)
        if not 0 < own < len(labels):  # none of them repeated, or a loss that gathering drops anyway
            return inputs
        repeated = torch.arange(len(labels), device=labels.device).unsqueeze(1) >= own
        return {**inputs, "labels": labels.masked_fill(repeated, IGNORED_LABEL)}

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Trainer's, without counting as training time."""
        with self.throughput.paused():
            return super().evaluate(*args, **kwargs)

    # Run

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train; on Ctrl-C save a checkpoint first.

        Args:
            resume_from_checkpoint: a checkpoint's folder, or True for the newest complete one of ``args.output_dir``.
            *args: Trainer's other arguments.
            **kwargs: likewise.

        Raises:
            ReftuneError: nothing complete to resume from, or a checkpoint could not be written.
            KeyboardInterrupt: after Ctrl-C.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ReftuneError(f"No complete checkpoint in {self.args.output_dir}: train without resuming.")
        elif resume_from_checkpoint:
            require_complete(resume_from_checkpoint)
        self._resumed_from = resume_from_checkpoint or None
        self._saved_step = self._loaded_step = None
        self._initial_global_step = self.state.global_step  # until the loop sets it: nothing was trained yet
        self._plain_reasons.clear()
        try:
            with self._interrupts.listening():
                try:
                    return super().train(resume_from_checkpoint, *args, **kwargs)
                except KeyboardInterrupt:
                    self._save_interrupted()
                    raise
        finally:
            self.is_in_train = False
            if self._progress is not None:
                self._progress.close()

    def train_begins(self) -> None:
        """Take up what transformers' checkpoints leave out. Called once the loop is set up, before its first step.

        Raises:
            ReftuneError: a distributed wrapper under which these edits cannot be trained.
        """
        refuse_lost_retractions(self.model_wrapped)
        self._drop_input_gradients()
        self.throughput.begin()
        self._loss_before = (0.0, 0)
        state_file = Path(self._resumed_from or "") / RUN_STATE_NAME
        if self._resumed_from is None or not state_file.is_file():
            return
        record = json.loads(state_file.read_text(encoding="utf-8"))
        pending = torch.tensor(record["pending_loss"], dtype=self._tr_loss.dtype, device=self._tr_loss.device)
        self._tr_loss += pending
        self._total_loss_scalar -= pending.item()  # it belongs to the next log entry, not to this call's mean loss
        self._globalstep_last_logged = record["last_logged_step"]
        self._loss_before = (record["loss_sum"], self.state.global_step)
        self.throughput.begin(record["throughput"], epoch_is_over=float(self.state.epoch or 0).is_integer())

    def refuse_divergence(self, control: TrainerControl) -> None:
        """After a step: stop before anything is logged or saved of a training that has come to nothing.

        Raises:
            ReftuneError: the loss or a trained parameter is no finite number.
        """
        looks = control.should_log or control.should_save or control.should_evaluate or control.should_epoch_stop
        if self._diverged is None or not (looks or self._diverged.device.type == "cpu"):
            return  # looking waits for the device
        scaled = getattr(self.accelerator, "scaler", None) is not None  # float16: such steps are skipped
        what = "the loss" if bool(self._diverged) and not scaled else ""
        self._diverged = None
        if not what:
            trained = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
            what = next((n for n, p in trained if not bool(torch.isfinite(p.detach()).all())), "")
        if what:
            last = last_complete_checkpoint(self.args.output_dir)
            kept = f"; {last} is from before it" if last else ""
            raise ReftuneError(
                f"Training diverged: at step {self.state.global_step} {what} is not a finite number{kept}. Lower the "
                f"learning rate ({self.args.learning_rate:g}), warm it up, or use float32."
            )

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
        batch_size = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        self._sampler = LengthGroupedByEpoch(lengths, batch_size, seed)
        return self._sampler

    def _drop_input_gradients(self) -> None:
        """Undo what transformers and PEFT do for re-entrant checkpointing, the one kind that needs it."""
        settings = checkpointing_settings(self.args)
        base: Any = plain_model(self.model)
        if not settings.get("use_reentrant", False) and hasattr(base, "disable_input_require_grads"):
            base.disable_input_require_grads()

    # Checkpoints

    def _get_output_dir(self, trial: Any) -> str:
        return self._unfinished if self._unfinished is not None else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write the checkpoint beside its place, then move it there; a failed write leaves nothing behind."""
        run_dir = super()._get_output_dir(trial)
        name = f"checkpoint-{self.state.global_step}"
        # Pushing to the Hub reads the folder in the background, so that it must not move: written in place, then.
        beside = None if self.args.push_to_hub else os.path.join(run_dir, UNFINISHED)
        with self.throughput.paused(), readable_write_errors(run_dir, beside):
            if beside is not None and self.args.should_save:
                clear_leftovers(run_dir)
            self._wait_for_all()
            self._unfinished = beside
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._unfinished = None
            written = os.path.join(beside or run_dir, name)
            best = self.state.best_model_checkpoint
            if beside is not None and best is not None and os.path.dirname(best) == beside:
                self.state.best_model_checkpoint = os.path.join(run_dir, os.path.basename(best))
            record = self._run_record()
            if self.args.should_save:
                self.state.save_to_json(os.path.join(written, TRAINER_STATE_NAME))
                if beside is not None:
                    record["files"] = written_files(Path(written))
                Path(written, RUN_STATE_NAME).write_text(json.dumps(record), encoding="utf-8")
            self._wait_for_all()
            if beside is not None and self.args.should_save:
                publish(written, os.path.join(run_dir, name))
                os.rmdir(beside)
                rotate_checkpoints(
                    run_dir, self.args.save_total_limit, self.state.best_model_checkpoint, use_mtime=True
                )
            self._wait_for_all()
        self._saved_step = self.state.global_step

    def _load_best_model(self) -> None:
        """Load the best checkpoint, whatever its adapters are called (Trainer looks for one named default)."""
        best, names = self.state.best_model_checkpoint or "", list(getattr(self.model, "peft_config", ()))
        is_here = os.path.isdir(best)
        if not is_here or not names or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
        elif isinstance(self.model, PeftModel):
            for name in names:
                folder = best if name == "default" else os.path.join(best, name)
                self.model.load_adapter(folder, name, torch_device=str(self.args.device))
        else:  # transformers' own add_adapter: the active one was saved
            weights = load_peft_weights(best, device=str(self.args.device))
            set_peft_model_state_dict(self.model, weights, adapter_name=self.model.active_adapters()[0])
        self._loaded_step = self.state.best_global_step if is_here else None

    def _run_record(self) -> dict[str, Any]:
        gathered: Any = self.accelerator.gather(self._tr_loss)
        pending = float(gathered.mean().item())
        return {
            "pending_loss": pending,
            "last_logged_step": self._globalstep_last_logged,
            "loss_sum": self._loss_before[0] + self._total_loss_scalar + pending,
            "throughput": self.throughput.record(),
        }

    def _wait_for_all(self) -> None:
        if self.accelerator.num_processes > 1:
            self.accelerator.wait_for_everyone()

    def _save_interrupted(self) -> None:
        step = self.state.global_step
        # In the middle of a step the weights are still those of its beginning; only the random state has moved on.
        if step > self._initial_global_step and step != self._saved_step and self._interrupts.can_save(step):
            if self.hp_search_backend is None:
                self.model_wrapped.zero_grad()
                self._interrupts.back_to_step(step)
                self._save_checkpoint(self.model_wrapped, None)
        last = last_complete_checkpoint(self.args.output_dir)
        go_on = f"; resume from {last}" if last else ", before there was anything to save"
        logger.warning("Training was interrupted after step %s%s.", step, go_on)

    # Report

    def report(self) -> dict[str, Any]:
        """What training came to, over all the runs that were resumed to get here.

        Returns:
            train_loss (mean over the steps), eval_loss (of the best checkpoint where that was loaded, else the last;
            None without evaluation), epoch_seconds (a list; training alone, a broken-off epoch not counted),
            tokens_per_second, tokens, steps, trainable_parameters, peak_memory_bytes, prefix_reuse ("on", or "off" with
            the reason), prefix_store (entries, bytes, hits).
        """
        history = self.state.log_history
        summary = next((entry["train_loss"] for entry in reversed(history) if "train_loss" in entry), None)
        evaluated = [entry for entry in history if "eval_loss" in entry]
        if self._loaded_step is None:
            eval_loss = evaluated[-1]["eval_loss"] if evaluated else None
        else:
            eval_loss = next((entry["eval_loss"] for entry in evaluated if entry["step"] == self._loaded_step), None)
        return {
            "train_loss": summary if summary is None else self._mean_loss(summary),
            "eval_loss": eval_loss,
            "epoch_seconds": list(self.throughput.epoch_seconds),
            "tokens_per_second": self.throughput.tokens_per_second,
            "tokens": self.throughput.tokens,
            "steps": self.state.global_step,
            "trainable_parameters": sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            "peak_memory_bytes": peak_memory_bytes(),
            "prefix_reuse": self.prefixes.status,
            "prefix_store": self.prefixes.summary(),
        }

    def _mean_loss(self, this_call: float) -> float:
        """The mean over every step, of which Trainer's summary knows those of this call."""
        before, steps_before = self._loss_before
        if steps_before == 0:
            return this_call
        here = this_call * max(self.state.global_step - steps_before, 0.001)
        return (before + here) / max(self.state.global_step, 1)


class _TrainBegins(TrainerCallback):
    """Passes three events of the loop on to the trainer."""

    def __init__(self, trainer: ReftTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._trainer.train_begins()

    def on_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        retract_shards(self._trainer.model)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._trainer.refuse_divergence(control)

    def on_epoch_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._trainer.epoch_begins()
