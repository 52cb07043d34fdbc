"""The steps that both kinds of run take: a recipe as the trainer takes it, training, and what is written at the end."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from rich.console import Console
from transformers import EarlyStoppingCallback, get_scheduler
from transformers.trainer import TRAINER_STATE_NAME

from reftune import models
from reftune.adapter.config import new_adapter
from reftune.data.showing import show_examples
from reftune.data.streaming import StreamedRows
from reftune.engine.position_grammar import parse_positions
from reftune.engine.transformers_names import checkpointing_arguments
from reftune.errors import ReftuneError
from reftune.inference.loading import EditedModel, within_context
from reftune.output.files import write_text
from reftune.output.json_files import read_json_object
from reftune.runs import processes
from reftune.runs.fingerprint import check_resumed, fingerprint
from reftune.runs.known_settings import told_as_keys
from reftune.runs.model_card import model_card
from reftune.runs.output_folder import (
    CARD_FILE,
    CURVE_FILE,
    METRICS_FILE,
    OutputPlace,
    begin_output,
    held_output,
    publish_run,
    readable_disk_errors,
    save_adapter,
    write_recipe,
)
from reftune.runs.plan import Plan
from reftune.runs.recipe import PREFERENCES, REWARDED, RUN_FILE, TrainRecipe
from reftune.training.arguments import ReftTrainingArguments
from reftune.training.checkpoints import last_complete_checkpoint
from reftune.training.resumable import ResumableTrainer
from reftune.training.row_lengths import check_row_lengths
from reftune.training.trainer import ReftTrainer

_WATCHING = ("greedy", "reduce_lr_on_plateau")
"""Schedules that go by the held-out loss."""

_LOOKED_AT = 64
"""Of rows that are streamed: how many decide what depends on the rows."""
_STREAMED: dict[str, Any] = {"train_sampling_strategy": "random", "accelerator_config": {"dispatch_batches": False}}
"""Each process reads the stream and takes its own rows: the batches are those of one process."""

logger = logging.getLogger(__name__)


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C in training; the message says what was saved and how to go on."""


@dataclass
class TrainedRun:
    """What training left: the folder, what its `metrics.json` holds, the model, and the losses logged."""

    folder: Path
    metrics: dict[str, Any]
    edited: EditedModel
    losses: list[float]

    def __repr__(self) -> str:
        return f"TrainedRun({str(self.folder)!r}, train_loss={self.metrics.get('train_loss')})"


def load_base(recipe: TrainRecipe, **others: Any) -> tuple[Any, Any]:
    """A recipe's base model and tokenizer (`others` as for `models.load`).

    A local folder is named by its full path: a relative one in the adapter's configuration is found from here alone.
    """
    name = recipe.full_path("model")
    with processes.first_alone("base"):  # it may have to be fetched, or converted
        return models.load(name, recipe.dtype, processes.device(recipe), quantization=recipe.quantization, **others)


def attach_edit(base: Any, recipe: TrainRecipe, head: Sequence[str] = (), **options: Any) -> PeftModel:
    """The base model with a recipe's edits on it, ready to train; **changes the base**.

    Args:
        base: the base model.
        recipe: `fitted` to it.
        head: see `TrainRecipe.adapter_config`.
        **options: PEFT's own.

    Raises:
        ReftuneError: a layer, component or rank that the model does not have.
    """
    with told_as_keys():
        return new_adapter(base, recipe.adapter_config(head), **options)


def encode_rows(
    rows: Sequence[Any] | Callable[[], Any], recipe: TrainRecipe, tokenizer: Any, label_names: Sequence[str] = ()
) -> Any:
    """Rows as the trainer takes them, in order; None where there are none. What reads rows gives those it streams."""
    if callable(rows):
        return StreamedRows(recipe.train_file, rows, recipe.encoding(tokenizer), recipe.stream_buffer, recipe.seed)
    if not rows:
        return None
    encoding, progress = recipe.encoding(tokenizer), len(rows) > 2000
    if recipe.objective != "completion":
        return encoding.pairs(rows, progress=progress)
    return encoding.dataset(rows, label_names=label_names, progress=progress)


@dataclass(frozen=True)
class Prepared:
    """What a kind of run has made of its recipe, ready to be trained.

    Attributes:
        recipe: as `run.yaml` keeps it, `fitted` to the base model.
        model: with the adapter on it.
        tokenizer: the base model's.
        digest: of the base model (see `runs.fingerprint.base_digest`).
        train, held_out: the rows, or what streams those to train on; there may be no held-out ones.
        report: what `metrics.json` holds beside the trainer's report and the numbers of rows.
        label_names: a classifier's classes.
        arguments: training arguments of this kind of run.
        compute_metrics: what the trainer calls after each evaluation.
        no_prefixes: why prefixes cannot be reused.
    """

    recipe: TrainRecipe
    model: Any
    tokenizer: Any
    digest: str
    train: Sequence[Any] | Callable[[], Any]
    held_out: Sequence[Any]
    report: Callable[[ReftTrainer], dict[str, Any]] = lambda trainer: {}
    label_names: Sequence[str] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict)
    compute_metrics: Callable[[Any], dict[str, float]] | None = None
    no_prefixes: str | None = None


def train_and_write(ready: Prepared, place: OutputPlace, console: Console) -> TrainedRun:
    """Tokenise, train, and write the output folder.

    Raises:
        ReftuneError: rows that the model cannot take, or as for `held_output` and `begin_training`.
        TrainingInterrupted: after Ctrl-C.
    """
    recipe, model, tokenizer = ready.recipe, ready.model, ready.tokenizer
    train_set, eval_set = (
        encode_rows(rows, recipe, tokenizer, ready.label_names) for rows in (ready.train, ready.held_out)
    )
    for rows in (train_set, eval_set):
        check_row_lengths(model, rows)
    count = 0 if recipe.streaming else len(train_set)
    shown = Dataset.from_list(list(islice(train_set, _LOOKED_AT))) if recipe.streaming else train_set
    recipe = processes.from_first("fitted", lambda: ready.recipe.fitted(model.get_base_model(), shown))
    plan = Plan(recipe, model, shown, eval_set, console)
    with held_output(recipe, place):
        trainer = ReftTrainer(
            model=model,
            args=training_arguments(recipe, place.folder, count, bool(ready.held_out), **ready.arguments),
            train_dataset=train_set,
            eval_dataset=eval_set,
            processing_class=tokenizer,
            compute_metrics=ready.compute_metrics,
            callbacks=[plan, *([EarlyStoppingCallback(recipe.patience)] if recipe.patience else [])],
        )
        if ready.no_prefixes is not None:
            trainer.prefixes.switch_off(ready.no_prefixes)
        begin_training(recipe, place, trainer, fingerprint(train_set, eval_set, ready.digest, model.dtype), console)
        train_until_done(trainer, recipe, place)
        counts = {"train_rows": count or None, "eval_rows": len(ready.held_out)}
        metrics = {**trainer.report(), **counts, **ready.report(trainer)}
        return write_results(recipe, place, trainer, metrics, tokenizer)


def begin_training(
    recipe: TrainRecipe, place: OutputPlace, trainer: ResumableTrainer, found: Mapping[str, str], console: Console
) -> None:
    """Refuse what cannot be trained, show the rows that were asked for and begin the output folder.

    Args:
        recipe: the recipe.
        place: where it writes.
        trainer: ready to train.
        found: see `runs.fingerprint.fingerprint`.
        console: where rows are shown.

    Raises:
        ReftuneError: a run that is resumed with other settings, or an optimiser or schedule that does not work here.
    """
    if place.checkpoint is not None:
        check_resumed(recipe, place.folder, found)
        _check_more_to_train(recipe, Path(place.checkpoint))
    _check_optimizer(trainer, recipe)
    if processes.rank() > 0:
        return
    if recipe.show:
        positions = parse_positions(recipe.positions)
        tokenizer: Any = trainer.processing_class
        show_examples(trainer.train_dataset, tokenizer, positions.ordinals, recipe.show, console)
    with readable_disk_errors(place.output):
        begin_output(recipe, place, found)


def _check_more_to_train(recipe: TrainRecipe, checkpoint: Path) -> None:
    """Refuse a resumed run that asks for less than is done, and say where nothing is left."""
    state = read_json_object(checkpoint / TRAINER_STATE_NAME)
    done, epochs = state["global_step"], state.get("epoch") or math.inf
    wanted = recipe.max_steps or math.ceil(recipe.epochs * done / epochs - 1e-6)
    asked = f"max_steps={recipe.max_steps}" if recipe.max_steps else f"epochs={recipe.epochs:g}"
    if done > wanted > 0:
        raise ReftuneError(
            f"resume: {checkpoint.name} has {done:,} steps behind it (epoch {epochs:g}), and {asked} asks for fewer: "
            "ask for more, or train without --resume."
        )
    if done == wanted and processes.rank() == 0:
        logger.warning("Nothing is left to train: %s has all the steps of %s behind it.", checkpoint.name, asked)


def _check_optimizer(trainer: ResumableTrainer, recipe: TrainRecipe) -> None:
    """Take a step of optimiser and schedule on a parameter of no use: some need packages, devices or more settings."""
    try:
        kind, settings = trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
        parameter = torch.nn.Parameter(torch.zeros(4, 4, device=trainer.args.device))
        parameter.grad = torch.ones_like(parameter)
        optimizer = kind([parameter], **settings)
        scheduler = get_scheduler(recipe.schedule, optimizer, 0, 10, trainer.args.lr_scheduler_kwargs)
        optimizer.step()
        if recipe.schedule not in _WATCHING:
            scheduler.step()
    except Exception as error:  # whatever a package that is missing, or a device, leads it to
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        named = f"optimizer={recipe.optimizer!r}, " if recipe.optimizer else ""
        raise ReftuneError(
            f"{named}schedule={recipe.schedule!r} cannot be trained with here ({reason}): use adamw_torch and linear, "
            "cosine or constant."
        ) from None


def train_until_done(trainer: ResumableTrainer, recipe: TrainRecipe, place: OutputPlace) -> None:
    """Train, and leave the model in evaluation mode.

    Raises:
        TrainingInterrupted: after Ctrl-C.
    """
    try:
        trainer.train(resume_from_checkpoint=place.checkpoint)
    except KeyboardInterrupt as interrupt:
        raise TrainingInterrupted(_how_to_go_on(recipe, place)) from interrupt
    trainer.model.eval()


def write_results(
    recipe: TrainRecipe, place: OutputPlace, trainer: ResumableTrainer, metrics: dict[str, Any], tokenizer: Any
) -> TrainedRun:
    """Write adapter, curve, card and, last, the metrics: `metrics.json` says that the run is whole."""
    output = place.folder
    model = trainer.model
    trl = recipe.objective in PREFERENCES
    unit = "loss" if trl or recipe.task == "classification" else "loss (nats per completion token)"
    if processes.rank() == 0:
        with readable_disk_errors(output):
            save_adapter(model, output)
            if recipe.objective in REWARDED:
                _draw_curve(trainer, output / CURVE_FILE, "mean reward", "reward")
            else:
                _draw_curve(trainer, output / CURVE_FILE, unit)
            write_recipe(recipe, output)
            write_text(output / CARD_FILE, model_card(recipe, metrics, tokenizer))
            write_text(output / METRICS_FILE, json.dumps(metrics, indent=2) + "\n")
            publish_run(place)
    encoding = within_context(recipe.encoding(tokenizer), model.get_base_model())
    edited = EditedModel(model, tokenizer, encoding, place.output)
    return TrainedRun(place.output, metrics, edited, [e["loss"] for e in trainer.state.log_history if "loss" in e])


def training_arguments(
    recipe: TrainRecipe, output: Path, rows: int, evaluates: bool, **others: Any
) -> ReftTrainingArguments:
    """What a recipe means for `ReftTrainer`; arguments as for `trainer_arguments`, and ``others``, which win."""
    own = {"prefix_reuse": recipe.prefix_reuse, "objective": recipe.objective, "factors": recipe.factors or [1.0]}
    return ReftTrainingArguments(**(trainer_arguments(recipe, output, rows, evaluates) | own | others))


def trainer_arguments(recipe: TrainRecipe, output: Path, rows: int, evaluates: bool) -> dict[str, Any]:
    """What a recipe means for transformers' Trainer.

    Args:
        recipe: the recipe.
        output: where checkpoints and logs go.
        rows: number of training rows; of no meaning where they are streamed.
        evaluates: whether to evaluate and save after each epoch, and keep the best.
    """
    if recipe.schedule in _WATCHING and not evaluates:
        raise ReftuneError(
            f"schedule={recipe.schedule!r} goes by the held-out loss: give --eval-file or --eval-fraction, or another."
        )
    steps = recipe.max_steps or max(1, -(-rows // recipe.rows_of_a_step)) * recipe.epochs
    eval_steps, save_steps = recipe.eval_steps or recipe.save_steps, recipe.save_steps or recipe.eval_steps
    best: dict[str, Any] = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"} if evaluates else {}
    return dict(
        output_dir=str(output),
        num_train_epochs=recipe.epochs,
        max_steps=recipe.max_steps or -1,
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.gradient_accumulation,
        learning_rate=recipe.lr,
        warmup_steps=recipe.warmup_ratio if recipe.warmup_steps is None else recipe.warmup_steps,
        weight_decay=recipe.weight_decay,
        lr_scheduler_type=recipe.schedule,
        max_grad_norm=recipe.max_grad_norm,
        seed=recipe.seed,
        logging_steps=recipe.log_every or max(1, round(steps / 100)),
        save_strategy="steps" if save_steps else "epoch",
        save_steps=save_steps or 500,
        save_total_limit=recipe.save_total_limit or 2,
        eval_strategy="no" if not evaluates else "steps" if eval_steps else "epoch",
        eval_steps=eval_steps,
        report_to=_report_to(recipe),
        ddp_find_unused_parameters=None if recipe.task == "classification" else False,  # of an edit all are used
        use_cpu=processes.device(recipe) == "cpu",
        disable_tqdm=recipe.quiet,  # by default it follows the libraries' verbosity, and the progress would go with it
        **_STREAMED if recipe.streaming else {},
        **checkpointing_arguments(recipe.gradient_checkpointing),
        **({"optim": _optimizer(recipe.optimizer)} if recipe.optimizer else {}),
        **best,
    )


def _optimizer(name: str) -> str:
    if any(mark in name for mark in ("paged", "8bit", "bnb")) and importlib.util.find_spec("bitsandbytes") is None:
        raise ReftuneError(
            f"optimizer={name!r} needs bitsandbytes, which is not installed: run `pip install 'reftune[quantised]'`, "
            "or give --optimizer adamw_torch."
        )
    return name


def _report_to(recipe: TrainRecipe) -> Any:
    flags = [name for name, on in (("tensorboard", recipe.tensorboard), ("wandb", recipe.wandb)) if on]
    wanted = [name for name in recipe.report_to or flags if name != "none"]
    if wanted == ["tensorboard"]:
        return "tensorboard"  # the default, which falls back to nothing where TensorBoard is not installed
    for name in wanted:
        if name != "tensorboard" and importlib.util.find_spec(name) is None:
            key = f"report_to={name!r}" if recipe.report_to else f"{name}=true"
            raise ReftuneError(f"{key}: it is not installed; run `pip install {name}`.")
    return wanted or "none"


def _draw_curve(trainer: ResumableTrainer, path: Path, unit: str, name: str = "loss") -> None:
    """Draw the losses; a picture that cannot be drawn loses nobody a run."""
    try:
        from reftune.training.plots import plot_loss

        plot_loss(trainer.state.log_history, path, unit, name)
    except OSError:
        raise
    except Exception as error:  # matplotlib, installed in part or in a wrong version, raises anything
        logger.warning("No loss curve was drawn: %s: %s", type(error).__name__, error)


def _how_to_go_on(recipe: TrainRecipe, place: OutputPlace) -> str:
    last = last_complete_checkpoint(place.folder)
    if last is None:
        return "Interrupted before the first checkpoint; nothing was saved."
    return f"Interrupted. Saved: {last}. Go on with: reftune train {recipe.output}/{RUN_FILE} --resume"
