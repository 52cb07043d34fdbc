"""Carry out a recipe whose objective is one of TRL's: preferences between answers, and rewards of written ones.

| objective | rows | what is minimised |
|---|---|---|
| `dpo` | prompt, chosen, rejected | -log sigmoid(beta x margin over the unedited model), Rafailov et al. 2305.18290 |
| `orpo` | the same | the chosen answer's loss and a penalty on the odds of the rejected one, Hong et al. 2403.07691 |
| `kto` | prompt, completion, label (true, false) | each answer's utility by itself, Ethayarajh et al. 2402.01306 |
| `grpo`, `rloo` | prompt, and what the reward reads | minus the reward of answers it writes, 2402.03300, 2402.14740 |

The trainers are TRL's own. What they are given is text as every other command writes prompts, with the adapter's
positions in it; the reference model is the same model with the edit switched off.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from datasets import Dataset
from rich.console import Console
from transformers import EarlyStoppingCallback

from reftune.data.formats import Example, examples_of, pairs_of, read_prompts
from reftune.data.reading import RawRow, read_rows
from reftune.data.splitting import split_rows
from reftune.data.tokenising import Encoding
from reftune.errors import ReftuneError
from reftune.evaluation.extraction import last_number, same
from reftune.evaluation.judging import load_function
from reftune.inference.loading import within_context
from reftune.runs.fingerprint import base_digest, fingerprint
from reftune.runs.output_folder import check_output, held_output
from reftune.runs.recipe import REWARDED, TrainRecipe
from reftune.runs.steps import (
    TrainedRun,
    begin_training,
    load_base,
    train_until_done,
    trainer_arguments,
    write_results,
)
from reftune.training.resumable import ResumableTrainer

_TRAINERS = {
    "dpo": ("trl.trainer.dpo", "DPO"),
    "kto": ("trl.trainer.kto", "KTO"),
    "orpo": ("trl.experimental.orpo.orpo", "ORPO"),
    "grpo": ("trl.trainer.grpo", "GRPO"),
    "rloo": ("trl.trainer.rloo", "RLOO"),
}
"""Module (without _trainer, _config) and name of TRL's classes."""
_LABELS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
_ANSWERS = ("completion", "response", "output", "answer")
_JUDGED = {"reward": "reward", "kl": "kl", "rewards/margins": "reward_margin", "rewards/accuracies": "reward_accuracy"}
"""What TRL logs, and what `metrics.json` calls it."""
_LARGEST = 1e30
Reward = Callable[..., list[float]]


def run_preferences(recipe: TrainRecipe, console: Console) -> TrainedRun:
    """Train as the recipe says, by TRL's trainer, and write the output folder; errors as for `run_training`."""
    place = check_output(recipe)
    reward = load_reward(recipe.reward) if recipe.objective in REWARDED else None
    train = _read(recipe, recipe.train_file)
    held_out = _read(recipe, recipe.eval_file) if recipe.eval_file else None
    train, held_out = split_rows(train, eval_fraction=recipe.eval_fraction, eval_rows=held_out, seed=recipe.seed)
    transformers.set_seed(recipe.seed)
    base, tokenizer = load_base(recipe)
    digest = base_digest(base)
    encoding = within_context(recipe.encoding(tokenizer), base)
    rows, eval_rows = (_encoded(recipe, encoding, examples) for examples in (train, held_out))
    train_set = Dataset.from_list(rows)
    eval_set = Dataset.from_list(eval_rows) if eval_rows else None
    recipe = recipe.fitted(base, train_set)
    with held_output(recipe, place), warnings.catch_warnings(), _without_bars():
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"trl\.")
        warnings.filterwarnings("ignore", category=UserWarning, module=r"trl\.")
        trainer = _trainer(recipe, place.folder, base, tokenizer, train_set, eval_set, reward, encoding)
        begin_training(recipe, place, trainer, fingerprint(train_set, eval_set, digest, base.dtype), console)
        train_until_done(trainer, recipe, place)
        counts = {"train_rows": len(train_set), "eval_rows": len(eval_rows)}
        metrics = {**trainer.report(), **counts, "objective": recipe.objective, **_scores(trainer.state.log_history)}
        for unknown in ("tokens", "tokens_per_second"):  # TRL's batches are its own
            del metrics[unknown]
        return write_results(recipe, place, trainer, metrics, tokenizer)


@contextmanager
def _without_bars() -> Iterator[None]:
    """Keep TRL's tokenising, of rows that are tokenised in a moment, from showing bars of its own."""
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def load_reward(source: str | None) -> Reward:
    """The reward that a recipe names: ``numeric``, or a function of the user's, of whose answers it checks each.

    Args:
        source: ``numeric``, ``FILE.py:function`` or ``module:function``. The function is called as TRL calls rewards:
            with lists of the same length, `prompts`, `completions` (texts) and every further column of the rows, by
            name; it gives a number for each. It may take those that it wants.

    Raises:
        ReftuneError: no such function. When it is called: not one finite number for each answer.
    """
    if source is None or source == "numeric":
        return numeric
    function = load_function(source, "reward")
    taken = inspect.signature(function).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())

    def reward(**given: Any) -> list[float]:
        try:
            values = function(**(given if takes_all else {name: given[name] for name in taken if name in given}))
        except (Exception, SystemExit) as error:  # whatever the user's own code raises
            raise ReftuneError(f"reward {source!r} failed: {type(error).__name__}: {error}") from error
        count, said = len(given["completions"]), f"reward {source!r} gave"
        if isinstance(values, (str, Mapping)) or not isinstance(values, Iterable):
            raise ReftuneError(
                f"{said} {type(values).__name__}: give a list with a number for each of {count} answers."
            )
        found = [value.item() if hasattr(value, "item") else value for value in values]  # numbers of numpy or torch
        if len(found) != count:
            raise ReftuneError(f"{said} {len(found)} numbers for {count} answers: give one for each.")
        for value in found:
            if not isinstance(value, (int, float)) or not abs(value) < _LARGEST:
                raise ReftuneError(f"{said} {value!r:.60}: give finite numbers, below {_LARGEST:g}.")
        return [float(value) for value in found]

    reward.__name__ = getattr(function, "__name__", "reward")
    return reward


def numeric(completions: Sequence[str], **columns: Any) -> list[float]:
    """1 where an answer's last number is the row's (its last one, as in GSM8K's `#### 42`), else 0.

    Raises:
        ReftuneError: rows without an answer's column, or without a number in it.
    """
    column = _column_of_answers(columns)
    return [
        float(same(last_number(text), _number(gold, column)))
        for text, gold in zip(completions, columns[column], strict=True)
    ]


def _column_of_answers(columns: Iterable[str]) -> str:
    found = next((name for name in _ANSWERS if name in columns), None)
    if found is None:
        raise ReftuneError(f"reward 'numeric' needs a column with the right answer: one of {', '.join(_ANSWERS)}.")
    return found


def _number(answer: Any, column: str) -> float:
    number = last_number("" if answer is None else str(answer))
    if number is None:
        raise ReftuneError(f"reward 'numeric': {answer!r:.60} in {column!r} has no number.")
    return number


def _read(recipe: TrainRecipe, source: str) -> list[tuple[Example, RawRow]]:
    columns = recipe.columns if isinstance(recipe.columns, dict) else None
    rows = read_rows(source, split=recipe.split)[: recipe.limit_rows]
    if recipe.objective in ("dpo", "orpo"):
        examples = pairs_of(rows, columns=columns, sides=("chosen", "rejected"))
    elif recipe.objective == "kto":
        examples = examples_of(
            rows, columns={name: column for name, column in (columns or {}).items() if name != "label"}
        )
    else:
        examples = read_prompts(rows, columns=columns)
        if recipe.reward in (None, "numeric"):
            for row in rows:
                try:
                    column = _column_of_answers(row.values)
                    _number(row.values[column], column)
                except ReftuneError as error:
                    raise ReftuneError(f"{row.where}: {error}") from None
    if len(examples) != len(rows):
        raise ReftuneError(f"{source}: objective={recipe.objective!r} takes one answer a row: split conversations.")
    return list(zip(examples, rows, strict=True))


def _encoded(recipe: TrainRecipe, encoding: Encoding, rows: Sequence[tuple[Example, RawRow]]) -> list[dict[str, Any]]:
    """Rows in TRL's shapes, as text; answers with the end of their turn.

    Raises:
        ReftuneError: a row without its label, or longer than the model reads.
    """
    tokenizer, found = encoding.tokenizer, []
    for example, row in rows:
        prompt, answers, more = encoding.render(example), {}, {}
        if recipe.objective in REWARDED:
            more = {name: value for name, value in row.values.items() if name != "completions"}
        elif recipe.objective == "kto":
            answers, more = {"completion": encoding.turn(example)[1]}, {"label": _label(row, recipe)}
        else:
            worse = replace(example, completion=example.rejected or "")
            answers = {"chosen": encoding.turn(example)[1], "rejected": encoding.turn(worse)[1]}
        if encoding.tokenizer_writes_bos:  # TRL has it do so
            prompt = prompt.removeprefix(str(tokenizer.bos_token))
        longest = max(len(tokenizer(prompt + text).input_ids) for text in answers.values() or [""])
        longest += recipe.answer_tokens if recipe.objective in REWARDED else 0
        if encoding.limit is not None and longest > encoding.limit:
            raise ReftuneError(
                f"{row.where}: {longest} tokens, prompt and answer, and {encoding.limit} can be read: shorten it, or "
                "raise --max-length where the model reads more."
            )
        found.append({**more, **answers, "prompt": prompt})
    return found


def _label(row: RawRow, recipe: TrainRecipe) -> bool:
    column = recipe.columns.get("label", "label") if isinstance(recipe.columns, dict) else "label"
    if column not in row.values:
        raise ReftuneError(f"{row.where}: field {column!r} is missing: say whether the answer is good (true or false).")
    label = _LABELS.get(str(row.values[column]).strip().lower().removesuffix(".0"))
    if label is None:
        raise ReftuneError(f"{row.where}: {column!r} is {row.values[column]!r:.60}; write true or false.")
    return label


def _trainer(
    recipe: TrainRecipe,
    folder: Path,
    base: Any,
    tokenizer: Any,
    train_set: Dataset,
    eval_set: Dataset | None,
    reward: Reward | None,
    encoding: Encoding,
) -> ResumableTrainer:
    module, name = _TRAINERS[recipe.objective]
    try:
        kind: Any = getattr(import_module(f"{module}_trainer"), f"{name}Trainer")
        settings: Any = getattr(import_module(f"{module}_config"), f"{name}Config")
    except ImportError as error:
        raise ReftuneError(
            f"objective={recipe.objective!r} is TRL's ({error}): run `pip install 'reftune[trl]'`."
        ) from None
    arguments = trainer_arguments(
        recipe, folder, len(train_set) * (1 if reward is None else recipe.answers), eval_set is not None
    )
    arguments |= {"bf16": False, "remove_unused_columns": False}
    if recipe.beta is not None:
        arguments["beta"] = recipe.beta
    if reward is not None:
        arguments |= {
            "num_generations": recipe.answers,
            "max_completion_length": recipe.answer_tokens,
            "per_device_eval_batch_size": math.lcm(recipe.answers, int(recipe.batch_size)),
        }
        if eval_set is not None:
            arguments |= {"metric_for_best_model": "eval_reward", "greater_is_better": True}
    else:
        arguments["max_length"] = encoding.limit if recipe.objective == "orpo" else None

    class Resumable(ResumableTrainer, kind):
        """The trainer of TRL, with our checkpoints."""

        shown = ("loss",) if reward is None else ("reward",)

        def create_model_card(self, *args: Any, **kwargs: Any) -> None:
            """Nothing: the card is written at the end."""

    if recipe.objective == "orpo":
        Resumable.concatenated_forward = _saying_where_prompts_end(kind.concatenated_forward)  # type: ignore[attr-defined]
    return Resumable(
        model=base,
        args=settings(**arguments),
        train_dataset=train_set,
        eval_dataset=eval_set,
        processing_class=tokenizer,
        peft_config=recipe.adapter_config(),
        callbacks=[EarlyStoppingCallback(recipe.patience)] if recipe.patience else None,
        **({} if reward is None else {"reward_funcs": reward}),
    )


def _saying_where_prompts_end(forward: Callable[..., Any]) -> Callable[..., Any]:
    """ORPO's forward with the prompt's length for each row, which its batch holds and its call leaves out."""

    def concatenated_forward(self: Any, model: Any, batch: Any) -> Any:
        rows = [*batch["chosen_labels"], *batch["rejected_labels"]]
        ends = torch.stack([(row != -100).int().argmax() for row in rows])

        def told(*args: Any, **kwargs: Any) -> Any:
            return model(*args, prompt_lengths=ends, **kwargs)

        return forward(self, told, batch)

    return concatenated_forward


def _scores(history: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What an objective is judged by, as it was over the last tenth of the steps that were logged."""
    found = {}
    for key, name in _JUDGED.items():
        values = [float(entry[key]) for entry in history if key in entry]
        if values:
            last = values[-max(1, len(values) // 10) :]
            found[name] = sum(last) / len(last)
    evaluated = [float(entry["eval_reward"]) for entry in history if "eval_reward" in entry]
    return found | ({"eval_reward": max(evaluated)} if evaluated else {})
