"""One run: one method with one seed, trained and measured."""

from __future__ import annotations

import hashlib
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from reftune.adapter.config import ReftConfig, new_adapter
from reftune.comparison.methods import Adapted, Method, attach_method, judged_rows, prompt_encoding
from reftune.comparison.peak_memory import PeakMemory
from reftune.comparison.recipe import CompareRecipe
from reftune.comparison.results import RunResult, data_digest, fingerprint, run_folder
from reftune.data.formats import Example
from reftune.data.persona import neutral_rows
from reftune.data.tokenising import Encoding
from reftune.evaluation.heldout import exact_match
from reftune.evaluation.options import Norm, evaluate_options, read_option_rows
from reftune.evaluation.row_losses import RowLosses, row_losses
from reftune.evaluation.side_effects import AgainstBase, measure_side_effects, read_refusal_rows
from reftune.inference.generation import GenerationSettings, generate_answers
from reftune.inference.loading import EditedModel, within_context
from reftune.output.files import write_text
from reftune.runs.completion import read_data
from reftune.runs.recipe import RUN_FILE, TrainRecipe
from reftune.runs.steps import encode_rows, load_base, training_arguments
from reftune.training.prefix.store import PrefixStore
from reftune.training.trainer import ReftTrainer

ADAPTER_FOLDER = "adapter"
OPTION_NORMS: tuple[Norm, ...] = ("acc", "acc_norm")
_PACKAGES = ("reftune", "torch", "transformers", "peft")

Progress = Callable[[dict[str, Any]], None]
"""Told how a run goes on: `step`, `steps`, `loss`, `held_out`, or `doing` (a word), whichever there is."""


def execute(
    recipe: CompareRecipe,
    method: Method,
    seed: int,
    tell: Progress,
    *,
    own_process: bool,
    store: PrefixStore | None = None,
) -> RunResult:
    """Train and measure one run and write its folder, `result.json` last; **replaces what was there**.

    Args:
        recipe: the comparison.
        method: one of its methods.
        seed: one of its seeds.
        tell: told how it goes on.
        own_process: whether this process does nothing else, so that its memory is the run's.
        store: prefixes of earlier runs of edits on the same model in this process.

    Raises:
        ReftuneError: anything the user can mend.
    """
    folder = run_folder(recipe, method, seed)
    _clear(folder)
    train_rows, held_out = read_data(recipe.shared)  # split by the shared seed: the same rows for every run
    settings = replace(method.train, seed=seed, output=str(folder))
    tell({"doing": "loading"})
    memory = PeakMemory(own_process)
    transformers.set_seed(seed)
    base, tokenizer = load_base(settings)
    adapted = attach_method(method, base, tokenizer)
    context = within_context(settings.encoding(tokenizer), base)
    encoding = prompt_encoding(method, context, train_rows, seed)
    train_set = encode_rows(train_rows, settings, tokenizer)
    eval_set = judged_rows(method, held_out, settings, tokenizer, encoding)
    settings = settings.fitted(base, train_set)
    trainer = _ComparisonTrainer(
        model=adapted.model,
        args=training_arguments(
            settings,
            folder,
            len(train_set),
            False,
            save_strategy="no",
            disable_tqdm=True,
            supervised_logits_only=method.kind != "prompt",  # its tokens before the row shift what the head sees
        ),  # fmt: skip
        train_dataset=train_set,
        processing_class=tokenizer,
        prefix_store=store if method.edits else None,
    )
    evaluation = _EpochEvaluation(trainer, eval_set, tokenizer, trainer.args.per_device_eval_batch_size, tell)
    trainer.add_callback(evaluation)  # after the trainer's own, so that the clock has stopped
    evaluation.measure(0.0)
    if method.trains:
        trainer.train()
        report = trainer.report()
    else:
        report = {"epoch_seconds": [], "tokens_per_second": 0.0, "steps": 0, "prefix_reuse": "off"}
    peak = memory.bytes()
    losses = evaluation.measured
    best = min(losses, key=lambda pair: pair[1].per_token)
    parameters = [p for p in adapted.model.parameters() if p.requires_grad]
    size = _save(adapted, settings, method, folder / ADAPTER_FOLDER, parameters)
    trainer.prefixes.close()
    edited = _as_edited(adapted.model, tokenizer, encoding)
    answers = _answers(edited, held_out, recipe, method, tell)
    right = _options_right(edited, recipe, trainer.args.per_device_eval_batch_size, tell)
    effects = _side_effects(edited, adapted, context, recipe, settings, method, tell)
    matches = [exact_match(answer, row.completion) for answer, row in zip(answers, held_out, strict=False)]
    result = RunResult(
        method=method.name,
        seed=seed,
        fingerprint=fingerprint(recipe, method, seed, data_digest(train_rows, held_out)),
        settings=replace(method, train=settings).settings(),
        loss=losses[-1][1].per_token,
        best_loss=best[1].per_token,
        best_epoch=best[0],
        curve=[(epoch, found.per_token) for epoch, found in losses],
        train_curve=[(float(e["epoch"]), float(e["loss"])) for e in trainer.state.log_history if "loss" in e],
        row_losses=list(losses[-1][1].sums),
        best_row_losses=list(best[1].sums),
        row_tokens=list(best[1].tokens),
        exact_match=sum(matches) / len(matches) if matches else None,
        answers=answers,
        option_accuracy=sum(right["acc"]) / len(right["acc"]) if right else None,
        options_right=right,
        side_effects=effects,
        trainable_parameters=sum(parameter.numel() for parameter in parameters),
        train_seconds=float(sum(report["epoch_seconds"])),
        epoch_seconds=[float(seconds) for seconds in report["epoch_seconds"]],
        tokens_per_second=float(report["tokens_per_second"]),
        steps=int(report["steps"]),
        peak_memory_bytes=peak,
        adapter_bytes=size,
        order=trainer.order.hexdigest()[:16],
        prefix_reuse=str(report["prefix_reuse"]) if method.edits and not method.weights else "off: not an edit alone",
        shared_prefixes=store is not None and trainer.prefixes.status == "on",
        threads=torch.get_num_threads(),
        versions=_versions(base),
    )
    result.write(folder)
    return result


class _ComparisonTrainer(ReftTrainer):
    """Our trainer, which also remembers which rows it met in which order."""

    def __init__(self, **kwargs: Any) -> None:
        self.order = hashlib.sha256()
        super().__init__(**kwargs)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        self.order.update(inputs["input_ids"].cpu().numpy().tobytes())
        return super().training_step(model, inputs, num_items_in_batch)


class _EpochEvaluation(TrainerCallback):
    """Measures the held-out rows after each epoch and tells how training goes on.

    Attributes:
        measured: (epoch, losses) pairs.
    """

    def __init__(
        self, trainer: _ComparisonTrainer, rows: Any, tokenizer: PreTrainedTokenizerBase, batch_size: int,
        tell: Progress,
    ) -> None:  # fmt: skip
        self.measured: list[tuple[float, RowLosses]] = []
        self._trainer, self._rows, self._tell = trainer, rows, tell
        self._pad: Any = tokenizer.pad_token_id
        self._batch_size = batch_size
        self._told = 0.0

    def measure(self, epoch: float) -> None:
        """The held-out rows as the model is now."""
        trainer = self._trainer
        # Before training its store is not begun: what is shared by all rows is then found from the training rows.
        found = row_losses(trainer.model, self._rows, self._pad, self._batch_size, trainer.prefixes.forward)
        self.measured.append((epoch, found))
        self._tell({"held_out": found.per_token})

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.measure(float(state.epoch or 0.0))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if time.monotonic() - self._told > 0.2 or state.global_step == state.max_steps:
            self._told = time.monotonic()
            self._tell({"step": state.global_step, "steps": state.max_steps})

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs and "loss" in logs:
            self._tell({"loss": float(logs["loss"])})


def _clear(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def _save(adapted: Adapted, settings: TrainRecipe, method: Method, folder: Path, parameters: list[Any]) -> int:
    """Save the adapters; the bytes of their files. All the weights of a model are not saved, only counted."""
    if not adapted.adapters:
        return sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    for name, model in adapted.adapters.items():
        model.save_pretrained(str(folder), selected_adapters=[name], save_embedding_layers=False)
    size = sum(file.stat().st_size for kind in ("*.safetensors", "*.json") for file in folder.rglob(kind))
    if method.edits and method.weights is None:  # `reftune chat` then knows the template
        write_text(folder / RUN_FILE, replace(settings, output=str(folder)).to_yaml())
    return size


def _as_edited(model: Any, tokenizer: PreTrainedTokenizerBase, encoding: Encoding) -> EditedModel:
    """The trained model as generation and option scoring take it."""
    if not isinstance(model, PeftModel):  # they speak to PEFT models: an edit that is switched off changes no bit
        model = new_adapter(model, ReftConfig(method="lobireft", r=1, layers_to_transform=0, task_type="CAUSAL_LM"))
        model.base_model.disable_adapter_layers()
    model.eval()
    return EditedModel(model, tokenizer, encoding)


def _answers(
    edited: EditedModel, rows: list[Example], recipe: CompareRecipe, method: Method, tell: Progress
) -> list[str]:
    asked = rows if recipe.generate < 0 else rows[: recipe.generate]
    if not asked:
        return []
    tell({"doing": "answering"})
    with _writing(recipe, method) as settings:
        return [answer.text for answer in generate_answers(edited, asked, settings)]


@contextmanager
def _writing(recipe: CompareRecipe, method: Method) -> Iterator[GenerationSettings]:
    # PEFT drops position ids beside virtual tokens, so padding would stand between those and the prompt: one at a time.
    batch_size = 1 if method.kind in ("prefix", "prompt") else int(method.train.batch_size)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Position ids are not supported")
        yield GenerationSettings(max_new_tokens=recipe.max_new_tokens, batch_size=batch_size)


def _side_effects(
    edited: EditedModel, adapted: Adapted, plain: Encoding, recipe: CompareRecipe, settings: TrainRecipe,
    method: Method, tell: Progress,
) -> dict[str, float]:  # fmt: skip
    if not recipe.side_effects:
        return {}
    tell({"doing": "measuring side effects"})
    neutral = neutral_rows(recipe.neutral_file)
    rows: Any = plain.dataset(neutral).to_list()
    with ExitStack() as switched_off:
        for model in adapted.adapters.values():
            switched_off.enter_context(model.disable_adapter())
        base = load_base(settings)[0] if method.kind == "full" else adapted.model
        against = AgainstBase(base, rows, int(plain.tokenizer.pad_token_id), settings.batch_size)  # type: ignore[arg-type]
    refusals = read_refusal_rows(recipe.refusal_file) if recipe.refusal_file else []
    with _writing(recipe, method) as writing:
        return measure_side_effects(edited, against, neutral, writing, refusals=refusals).as_dict()


def _options_right(
    edited: EditedModel, recipe: CompareRecipe, batch_size: int, tell: Progress
) -> dict[str, list[bool]]:
    if recipe.options is None:
        return {}
    tell({"doing": "scoring options"})
    rows = read_option_rows(recipe.options)
    scores = evaluate_options(
        edited.model, edited.tokenizer, rows, encoding=edited.encoding, batch_size=batch_size
    )  # fmt: skip
    return {norm: [score.right(norm) for score in scores] for norm in OPTION_NORMS}


def _versions(base: Any) -> dict[str, str]:
    found = {name: metadata.version(name) for name in _PACKAGES}
    device = next(base.parameters()).device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device.type)
    return {**found, "device": name, "dtype": str(base.dtype).removeprefix("torch.")}
