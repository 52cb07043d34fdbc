"""Carry out a recipe: read, tokenise, attach, train, and write the output folder that `generate` and the rest read."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel, get_peft_model
from rich.console import Console

from reftune import models
from reftune.checkpoint import CONFIG_FILE, WEIGHTS_FILE
from reftune.data.formats import Example, read_examples
from reftune.data.showing import show_examples
from reftune.data.splitting import split_rows
from reftune.data.tokenising import encode_dataset
from reftune.errors import ReftuneError
from reftune.inference.loading import EditedModel, within_context
from reftune.model_card import model_card
from reftune.positions import parse_positions
from reftune.recipes import DEMO_DATA, RUN_FILE, TrainRecipe
from reftune.training.arguments import ReftTrainingArguments
from reftune.training.checkpoints import last_complete_checkpoint
from reftune.training.plots import plot_loss
from reftune.training.trainer import ReftTrainer

METRICS_FILE, CARD_FILE, CURVE_FILE = "metrics.json", "README.md", "loss.png"
_UNFINISHED = ".unfinished-adapter"


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C in training; the message says what was saved and how to go on."""


@dataclass
class TrainedRun:
    """What training left: the folder, what its `metrics.json` holds, the model, and the losses logged."""

    folder: Path
    metrics: dict[str, Any]
    edited: EditedModel
    losses: list[float]


def run_training(recipe: TrainRecipe, console: Console | None = None) -> TrainedRun:
    """Train as the recipe says and write the output folder.

    Args:
        recipe: the recipe.
        console: where to print (`show` and the progress); standard error by default.

    Raises:
        ReftuneError: anything the user can mend; what the output folder held before is whole then.
        TrainingInterrupted: after Ctrl-C in training.
    """
    console = console or Console(stderr=True)
    if recipe.task == "classification":
        from reftune.classifier_runs import run_classification  # which is built on this module

        return run_classification(recipe, console)
    output = Path(recipe.output).expanduser()
    checkpoint = check_output(recipe, output)
    train_rows, eval_rows = read_data(recipe)
    transformers.set_seed(recipe.seed)
    name = recipe.full_path("model")  # a relative folder in the adapter's configuration would be found from here alone
    base, tokenizer = models.load(name, recipe.dtype, recipe.device, quantization=recipe.quantization)
    model = get_peft_model(base, recipe.adapter_config())
    if not isinstance(model, PeftModel):
        raise TypeError(f"get_peft_model returned a {type(model).__name__}")
    train_set, eval_set = (encode_rows(rows, recipe, tokenizer) for rows in (train_rows, eval_rows))
    begin_training(recipe, output, checkpoint, train_set, tokenizer, console)
    trainer = ReftTrainer(
        model=model,
        args=training_arguments(recipe, output, len(train_set), bool(eval_rows)),
        train_dataset=train_set,
        eval_dataset=eval_set,
        processing_class=tokenizer,
    )
    train_until_done(trainer, recipe, output, checkpoint)
    metrics = {**trainer.report(), "train_rows": len(train_rows), "eval_rows": len(eval_rows)}
    return write_results(recipe, output, trainer, metrics, tokenizer)


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


def read_data(recipe: TrainRecipe) -> tuple[list[Example], list[Example]]:
    """The training rows and the held-out rows (none where the recipe asks for none)."""

    def read(source: str) -> list[Example]:
        columns = recipe.columns if isinstance(recipe.columns, dict) else None
        if source == DEMO_DATA and not Path(source).exists():
            with resources.as_file(resources.files("reftune.data") / "demo_persona.jsonl") as file:
                return read_examples(file, limit=recipe.limit_rows)
        return read_examples(source, columns=columns, split=recipe.split, limit=recipe.limit_rows)

    rows = read(recipe.train_file)
    held_out = read(recipe.eval_file) if recipe.eval_file else None
    return split_rows(rows, eval_fraction=recipe.eval_fraction, eval_rows=held_out, seed=recipe.seed)


def encode_rows(rows: list[Example], recipe: TrainRecipe, tokenizer: Any) -> Any:
    """Rows as the trainer takes them, in order; None where there are none."""
    if not rows:
        return None
    return encode_dataset(
        rows,
        tokenizer,
        template=recipe.template,
        system_prompt=recipe.system_prompt,
        max_length=recipe.max_length,
        on_long_prompt=recipe.long_prompts,
        progress=len(rows) > 2000,
    )


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


# The output folder


def check_output(recipe: TrainRecipe, output: Path) -> str | None:
    """The checkpoint to resume from, or None to start; refuse what would destroy an unfinished run."""
    if output.exists() and not output.is_dir():
        raise ReftuneError(f"output={recipe.output!r} is a file; name a folder.")
    newest = last_complete_checkpoint(output)
    if recipe.resume:
        if newest is None:
            raise ReftuneError(f"resume: {output} holds no complete checkpoint; train without --resume.")
        return newest
    if newest and not recipe.overwrite and not (output / METRICS_FILE).is_file():
        raise ReftuneError(
            f"output={recipe.output!r} holds an unfinished run ({Path(newest).name}): go on with --resume, start "
            "again with --overwrite, or name another folder."
        )
    return None


def begin_output(recipe: TrainRecipe, output: Path, fresh: bool) -> None:
    """Make the folder, **forget what an earlier run left in it** (unless resumed), and write `run.yaml`."""
    output.mkdir(parents=True, exist_ok=True)
    (output / METRICS_FILE).unlink(missing_ok=True)
    if fresh:  # an earlier run's checkpoints are no part of this one
        for folder in output.glob("checkpoint-*"):
            shutil.rmtree(folder, ignore_errors=True)
    header = (
        f"# Written by reftune; `reftune train {recipe.output}/{RUN_FILE}` trains it again.\n"
        f"# torch {torch.__version__}, transformers {transformers.__version__}\n"
    )
    write_text(output / RUN_FILE, header + recipe.to_yaml())


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Write an adapter's two files, each whole or not at all, **in place of those in the folder**."""
    scratch = folder / _UNFINISHED
    try:
        model.save_pretrained(str(scratch))
        for name in (WEIGHTS_FILE, CONFIG_FILE):
            os.replace(scratch / name, folder / name)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a file, whole or not at all, **in place of the one that is there**."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def readable_disk_errors(folder: Path) -> Iterator[None]:
    """Say which folder could not be written, and what is still good there.

    Raises:
        ReftuneError: in place of an `OSError`, or of a safetensors error about the disk.
    """
    try:
        yield
    except ReftuneError:
        raise
    except Exception as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error)
        if not full and not isinstance(error, OSError):
            raise
        reason = "the disk is full" if full else (getattr(error, "strerror", None) or str(error))
        last = last_complete_checkpoint(folder)
        kept = f" {last} is whole: make room and go on with --resume." if last else ""
        raise ReftuneError(f"Cannot write to {folder}: {reason}.{kept}") from error


def _how_to_go_on(recipe: TrainRecipe, output: Path) -> str:
    last = last_complete_checkpoint(output)
    if last is None:
        return "Interrupted before the first checkpoint; nothing was saved."
    return f"Interrupted. Saved: {last}. Go on with: reftune train {recipe.output}/{RUN_FILE} --resume"
