"""Training one trial after the other on one base model, with one prefix store."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import transformers
from transformers import TrainerCallback, TrainerControl, TrainerState

from reftune.data.formats import Example
from reftune.errors import ReftuneError
from reftune.runs.completion import read_data
from reftune.runs.recipe import TrainRecipe, adapter_keys
from reftune.runs.steps import attach_edit, encode_rows, load_base, training_arguments
from reftune.sweeps.recipe import SweepRecipe
from reftune.sweeps.space import Choices
from reftune.training.prefix.store import PrefixStore
from reftune.training.trainer import ReftTrainer

_BASE = ("model", "dtype", "device", "quantization")
_ROWS = ("train_file", "eval_file", "eval_fraction", "split", "columns", "limit_rows", "seed")
_TOKENS = ("template", "system_prompt", "chat_template_kwargs", "max_length", "long_prompts")


@dataclass
class FinishedTrial:
    """A trained trial, before its adapter is taken off the base again.

    Attributes:
        recipe: what it trained, `fitted` to the base.
        trainer: with the best epoch's weights in its model.
        tokenizer: the base's.
        metrics: as `metrics.json` holds them.
    """

    recipe: TrainRecipe
    trainer: ReftTrainer
    tokenizer: Any
    metrics: dict[str, Any]


class EpochWatch(TrainerCallback):
    """Tells how a trial goes, and stops it where it is not worth going on.

    Args:
        on_step: gets (steps done, steps in all).
        on_epoch: gets (evaluations so far, eval loss, whether it was the last); True stops the trial.
    """

    def __init__(self, on_step: Callable[[int, int], None], on_epoch: Callable[[int, float, bool], bool]) -> None:
        self.evaluated = 0
        self._on_step = on_step
        self._on_epoch = on_epoch

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Tell how far it is."""
        self._on_step(state.global_step, state.max_steps)

    def on_evaluate(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Pass the loss on, and stop where told to, or where it is no number."""
        self.evaluated += 1
        loss = (metrics or {}).get("eval_loss", math.nan)
        last = state.global_step >= state.max_steps
        if self._on_epoch(self.evaluated, loss, last) or not math.isfinite(loss):
            control.should_training_stop = True


class TrialRunner:
    """Trains trials in this process: the base is loaded once, rows are tokenised once, prefixes are computed once.

    A trial comes out as `run_training` with its recipe would, but for rounding (what the store holds may have been
    computed in other batches).

    Args:
        sweep: the sweep.
        store: for what trials share.
    """

    def __init__(self, sweep: SweepRecipe, store: PrefixStore) -> None:
        self.store = store
        self._sweep = sweep
        self._known: dict[str, tuple[tuple[Any, ...], Any]] = {}

    def rows(self, recipe: TrainRecipe) -> tuple[list[Example], list[Example]]:
        """Training and held-out rows.

        Raises:
            ReftuneError: no held-out rows among them.
        """
        train, held_out = self._once("rows", recipe, _ROWS, lambda: read_data(recipe))
        if not held_out:
            source = f"eval_fraction={recipe.eval_fraction:g}" if recipe.eval_fraction else f"{recipe.eval_file}"
            raise ReftuneError(f"{self._sweep.source}: {source} gives no held-out row to judge trials by.")
        return train, held_out

    def check(self) -> None:
        """Attach each choice of the searched adapter fields once, so that what does not fit this model is told at once.

        Raises:
            ReftuneError: naming the choice.
        """
        base, _ = self._load(self._sweep.base)
        for name, options in self._sweep.space.items():
            if name not in adapter_keys():
                continue
            tried = options.values.values() if isinstance(options, Choices) else (options.low, options.high)
            for value in tried:
                value = value if isinstance(options, Choices) or not options.whole else int(value)
                try:
                    model: Any = attach_edit(base, self._sweep.trial({name: value}, "unused").fitted(base))
                except ReftuneError as error:
                    raise ReftuneError(f"{self._sweep.source}: search.{name}: {value!r}: {error}") from None
                model.unload()

    @contextmanager
    def trained(self, recipe: TrainRecipe, watch: EpochWatch) -> Iterator[FinishedTrial]:
        """Train a trial; its adapter is on the base for the length of the ``with`` block, and taken off after it.

        Args:
            recipe: what to train; checkpoints go to its `output`.
            watch: told how it goes.

        Raises:
            ReftuneError: settings that do not fit the model or the rows.
            KeyboardInterrupt: after Ctrl-C.
        """
        transformers.set_seed(recipe.seed)
        base, tokenizer = self._load(recipe)
        train, held_out = self.rows(recipe)
        train_set, eval_set = self._once(
            "tokens",
            recipe,
            (*_ROWS, *_TOKENS, "model"),
            lambda: (encode_rows(train, recipe, tokenizer), encode_rows(held_out, recipe, tokenizer)),
        )
        output = Path(recipe.output)
        trainer: ReftTrainer | None = None
        transformers.set_seed(recipe.seed)
        recipe = recipe.fitted(base, train_set)
        model: Any = attach_edit(base, recipe)
        try:
            trainer = ReftTrainer(
                model=model,
                args=training_arguments(recipe, output, len(train_set), True, report_to="none", disable_tqdm=True),
                train_dataset=train_set,
                eval_dataset=eval_set,
                processing_class=tokenizer,
                callbacks=[watch],
                prefix_store=self.store,
            )
            trainer.train()
            model.eval()
            metrics = {**trainer.report(), "train_rows": len(train), "eval_rows": len(held_out)}
            yield FinishedTrial(recipe, trainer, tokenizer, metrics)
        finally:
            if trainer is not None:
                trainer.prefixes.close()
            model.unload()

    def forget(self) -> None:
        """Free the base model and the rows; the next trial loads them again."""
        self._known.clear()

    def _load(self, recipe: TrainRecipe) -> tuple[Any, Any]:
        return self._once("base", recipe, _BASE, lambda: load_base(recipe))

    def _once(self, what: str, recipe: TrainRecipe, decided_by: tuple[str, ...], make: Callable[[], Any]) -> Any:
        """What was made last, where the fields that decide it are the same."""
        seedless = not recipe.eval_fraction  # the seed then chooses no rows
        names = [name for name in decided_by if not (name == "seed" and seedless)]
        assert set(names) <= {item.name for item in fields(TrainRecipe)}
        key = tuple(repr(getattr(recipe, name)) for name in names)
        if what not in self._known or self._known[what][0] != key:
            self._known.pop(what, None)  # before the next one is made: two base models may not fit
            self._known[what] = (key, make())
        return self._known[what][1]
