"""What a run is about to do, how long it will take, and when it should have stopped, told as it goes on."""

from __future__ import annotations

import math
import time
from typing import Any

from rich.console import Console
from transformers import TrainerCallback, TrainerControl, TrainerState

from reftune.runs.known_settings import bytes_of_a_token, learnt_tokens
from reftune.runs.recipe import TrainRecipe
from reftune.training.progress import print_line

_TIMED = 3
"""Steps after the first that tell how long the rest will take."""


def plan_of(recipe: TrainRecipe, model: Any, train_set: Any, eval_set: Any) -> str:
    """Rows, tokens, parameters, steps and memory of a run, in three lines.

    Args:
        recipe: `fitted` to the model and the rows.
        model: with the adapter on it.
        train_set: tokenised rows; of rows that are streamed, the first.
        eval_set: the held-out ones, or None.
    """
    base, lengths = model.get_base_model(), list(map(len, train_set["input_ids"]))
    rows = len(lengths)
    steps = math.ceil(rows / recipe.rows_of_a_step)
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    held += int(recipe.batch_size) * max(lengths) * bytes_of_a_token(base)
    learnt = f", {learnt_tokens(train_set):,} of them learnt" if recipe.task == "completion" else ""
    read = "rows as they are read" if recipe.streaming else f"{rows:,} rows, {sum(lengths):,} tokens{learnt}"
    epochs = f"{recipe.epochs:g} epoch{'s' * (recipe.epochs != 1)}"
    course = f"{epochs} of {steps:,}" if recipe.max_steps is None else f"{recipe.max_steps:,}"
    passes = f" in {recipe.gradient_accumulation} passes" if recipe.gradient_accumulation > 1 else ""
    return (
        f"{read}; {0 if eval_set is None else len(eval_set):,} rows held out\n"
        f"{settings_line(recipe, model)}\n"
        f"{course} steps of {recipe.rows_of_a_step} rows{passes}, learning rate {recipe.lr:g}; "
        f"memory up to about {held / 2**30:.1f} GiB"
    )


def settings_line(recipe: TrainRecipe, model: Any) -> str:
    """What is trained, and how many parameters; arguments as for `plan_of`."""
    layers = recipe.layers if isinstance(recipe.layers, list) else [recipe.layers]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return (
        f"{recipe.method}, rank {recipe.rank}, layers {','.join(map(str, layers))}, positions {recipe.positions}: "
        f"{trained:,} trainable parameters"
    )


class Plan(TrainerCallback):
    """Prints the plan before the first step, the minutes that it will take, and once that held-out loss rises.

    Args:
        recipe: `fitted` to the model and the rows; with its `quiet` only the rise is told.
        model: with the adapter on it.
        train_set: tokenised rows.
        eval_set: the held-out ones, or None.
        console: where to print.
    """

    def __init__(self, recipe: TrainRecipe, model: Any, train_set: Any, eval_set: Any, console: Console) -> None:
        self._text = "" if recipe.quiet else plan_of(recipe, model, train_set, eval_set)
        self._judged_by_loss, self._console = recipe.task == "completion", console
        self._first, self._began, self._warned = 0, 0.0, False

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Print the plan."""
        self._first = state.global_step
        if self._text and state.is_world_process_zero:
            print_line(self._console, self._text)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure a few steps, the first not among them, and say how long the others will take."""
        done = state.global_step - self._first
        if done == 1:
            self._began = time.monotonic()
        elif done == 1 + _TIMED and self._text and state.is_world_process_zero:
            minutes = (time.monotonic() - self._began) / _TIMED * (state.max_steps - state.global_step) / 60
            print_line(self._console, f"about {minutes:.0f} minutes" if minutes >= 1.5 else "about a minute or less")

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Say once that held-out loss rises."""
        found = [(entry["eval_loss"], entry["epoch"]) for entry in state.log_history if "eval_loss" in entry]
        if self._warned or not self._judged_by_loss or len(found) < 2 or not state.is_world_process_zero:
            return
        (last, now), (best, when) = found[-1], min(found)
        if last > best:
            self._warned = True
            print_line(
                self._console,
                f"Held-out loss rose to {last:.4f} in epoch {now:g}: the rows are learnt by heart. The best checkpoint "
                f"({best:.4f}, epoch {when:g}) is kept.",
            )
