"""The steps that both kinds of run take: a recipe as the trainer takes it, training, and what is written at the end."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from reftune.data.showing import show_examples
from reftune.engine.positions import parse_positions
from reftune.errors import ReftuneError
from reftune.inference.loading import EditedModel, within_context
from reftune.output.files import write_text
from reftune.runs.model_card import model_card
from reftune.runs.output_folder import (
    CARD_FILE,
    CURVE_FILE,
    METRICS_FILE,
    begin_output,
    readable_disk_errors,
    save_adapter,
)
from reftune.runs.recipe import RUN_FILE, TrainRecipe
from reftune.training.arguments import ReftTrainingArguments
from reftune.training.checkpoints import last_complete_checkpoint
from reftune.training.plots import plot_loss
from reftune.training.trainer import ReftTrainer


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C in training; the message says what was saved and how to go on."""


@dataclass
class TrainedRun:
    """What training left: the folder, what its `metrics.json` holds, the model, and the losses logged."""

    folder: Path
    metrics: dict[str, Any]
    edited: EditedModel
    losses: list[float]


def begin_training(
    recipe: TrainRecipe, output: Path, checkpoint: str | None, train_set: Any, tokenizer: Any, console: Console
) -> None:
    """Show the rows that were asked for and begin the output folder (see `begin_output`)."""
    if recipe.show:
        positions = parse_positions(recipe.positions)
        show_examples(train_set, tokenizer, positions.ordinals, recipe.show, console)
    with readable_disk_errors(output):
        begin_output(recipe, output, fresh=checkpoint is None)


def train_until_done(trainer: ReftTrainer, recipe: TrainRecipe, output: Path, checkpoint: str | None) -> None:
    """Train, and leave the model in evaluation mode.

    Raises:
        TrainingInterrupted: after Ctrl-C.
    """
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except KeyboardInterrupt as interrupt:
        raise TrainingInterrupted(_how_to_go_on(recipe, output)) from interrupt
    trainer.model.eval()


def write_results(
    recipe: TrainRecipe, output: Path, trainer: ReftTrainer, metrics: dict[str, Any], tokenizer: Any
) -> TrainedRun:
    """Write adapter, curve, card and, last, the metrics: `metrics.json` says that the run is whole."""
    model = trainer.model
    unit = "loss" if recipe.task == "classification" else "loss (nats per completion token)"
    with readable_disk_errors(output):
        save_adapter(model, output)
        plot_loss(trainer.state.log_history, output / CURVE_FILE, unit)
        write_text(output / CARD_FILE, model_card(recipe, metrics, tokenizer))
        write_text(output / METRICS_FILE, json.dumps(metrics, indent=2) + "\n")
    encoding = within_context(recipe.encoding(tokenizer), model.get_base_model())
    edited = EditedModel(model, tokenizer, encoding, output)
    return TrainedRun(output, metrics, edited, [e["loss"] for e in trainer.state.log_history if "loss" in e])


def training_arguments(
    recipe: TrainRecipe, output: Path, rows: int, evaluates: bool, **others: Any
) -> ReftTrainingArguments:
    """What a recipe means for the trainer.

    Args:
        recipe: the recipe.
        output: where checkpoints and logs go.
        rows: number of training rows.
        evaluates: whether to evaluate and save after each epoch, and keep the best.
        **others: arguments that win over these.
    """
    steps = max(1, -(-rows // (recipe.batch_size * recipe.gradient_accumulation))) * recipe.epochs
    report_to = [name for name, on in (("tensorboard", recipe.tensorboard), ("wandb", recipe.wandb)) if on]
    best: dict[str, Any] = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"} if evaluates else {}
    arguments: dict[str, Any] = dict(
        output_dir=str(output),
        num_train_epochs=recipe.epochs,
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.gradient_accumulation,
        learning_rate=recipe.lr,
        warmup_steps=recipe.warmup_ratio if recipe.warmup_steps is None else recipe.warmup_steps,
        weight_decay=recipe.weight_decay,
        lr_scheduler_type=recipe.schedule,
        max_grad_norm=recipe.max_grad_norm,
        gradient_checkpointing=recipe.gradient_checkpointing,
        prefix_reuse=recipe.prefix_reuse,
        seed=recipe.seed,
        logging_steps=recipe.log_every or max(1, round(steps / 100)),
        save_strategy="epoch",
        eval_strategy="epoch" if evaluates else "no",
        report_to=_report_to(report_to),
        use_cpu=recipe.device == "cpu",
        disable_tqdm=False,  # by default it follows the libraries' verbosity, and the progress would go with it
        **({"optim": _optimizer(recipe.optimizer)} if recipe.optimizer else {}),
        **best,
    )
    return ReftTrainingArguments(**(arguments | others))


def _optimizer(name: str) -> str:
    if any(mark in name for mark in ("paged", "8bit", "bnb")) and importlib.util.find_spec("bitsandbytes") is None:
        raise ReftuneError(
            f"optimizer={name!r} needs bitsandbytes, which is not installed: run `pip install 'reftune[quantised]'`, "
            "or give --optimizer adamw_torch."
        )
    return name


def _report_to(wanted: list[str]) -> Any:
    if wanted == ["tensorboard"]:
        return "tensorboard"  # the default, which falls back to nothing where TensorBoard is not installed
    if "wandb" in wanted:
        from transformers.integrations.integration_utils import is_wandb_available

        if not is_wandb_available():
            raise ReftuneError("wandb=true: Weights & Biases is not installed; run `pip install wandb`.")
    return wanted or "none"


def _how_to_go_on(recipe: TrainRecipe, output: Path) -> str:
    last = last_complete_checkpoint(output)
    if last is None:
        return "Interrupted before the first checkpoint; nothing was saved."
    return f"Interrupted. Saved: {last}. Go on with: reftune train {recipe.output}/{RUN_FILE} --resume"
