"""`ResumableTrainer`: a Trainer, transformers' or TRL's, that can be stopped and resumed and says what it came to."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput, rotate_checkpoints

from reftune.engine.transformers_names import checkpointing_settings
from reftune.errors import ReftuneError
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
from reftune.training.progress import ProgressBarCallback
from reftune.training.sharding import retract_shards
from reftune.training.supervised_logits import plain_model
from reftune.training.throughput import ThroughputCallback, peak_memory_bytes

logger = logging.getLogger(__name__)


class ResumableTrainer(Trainer):
    """What does not depend on the loss: whole checkpoints, exact resume, Ctrl-C, divergence, progress, the report.

    TRL's trainers get it as ``class Resumable(ResumableTrainer, DPOTrainer)``. See `ReftTrainer` for what it does.

    Args:
        *args: the other trainer's arguments.
        **kwargs: likewise.

    Attributes:
        shown: what progress shows (see `ProgressBarCallback`).
    """

    shown: ClassVar[tuple[str, ...] | None] = None
    args: Any
    model: Any
    model_wrapped: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.throughput = ThroughputCallback()
        self._interrupts = InterruptCallback()
        self._progress: ProgressBarCallback | None = None
        self._unfinished: str | None = None
        self._resumed_from: str | None = None
        self._saved_step: int | None = None
        self._loaded_step: int | None = None  # whose checkpoint's weights the model has, since training ended
        self._diverged: Tensor | None = None  # whether a loss was not finite since the last look
        self._loss_before = (0.0, 0)  # summed training loss and steps of the runs that this one resumes
        super().__init__(*args, **kwargs)
        for callback in (_TrainBegins(self), self.throughput, self._interrupts):
            self.add_callback(callback)
        if self.pop_callback(ProgressCallback) is not None:
            self._progress = ProgressBarCallback(self.throughput, shown=self.shown)
            self.add_callback(self._progress)
        self.remove_callback(PrinterCallback)
        self._drop_input_gradients()

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """One forward and backward."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        wrong = ~torch.isfinite(loss.detach()).all()
        self._diverged = wrong if self._diverged is None else self._diverged | wrong
        return loss

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
        """Take up what transformers' checkpoints leave out. Called once the loop is set up, before its first step."""
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

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Trainer's, without counting as training time."""
        with self.throughput.paused():
            return super().evaluate(*args, **kwargs)

    def epoch_begins(self) -> None:
        """Called at the beginning of each epoch."""

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
        device = "cpu" if self.args.device.type == "cpu" else str(self.args.device)  # several processes' is cpu:0
        if not is_here or not names or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
        elif isinstance(self.model, PeftModel):
            for name in names:
                folder = best if name == "default" else os.path.join(best, name)
                self.model.load_adapter(folder, name, torch_device=device)
        else:  # transformers' own add_adapter: the active one was saved
            weights = load_peft_weights(best, device=device)
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
            if self.hp_search_backend is None and self._interrupts.alone:  # a save needs all processes
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
            tokens_per_second, tokens, steps, trainable_parameters, peak_memory_bytes.
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

    def __init__(self, trainer: ResumableTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._trainer.train_begins()

    def on_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        retract_shards(self._trainer.model)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._trainer.refuse_divergence(control)

    def on_epoch_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._trainer.epoch_begins()
