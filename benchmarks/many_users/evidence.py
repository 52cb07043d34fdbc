"""What forty users with a habit each gain from an edit of their own: held-out loss, and whether answers have the habit."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

import reftune
from benchmarks.many_users.styles import HABITS, rows_of
from reftune.data.collating import CompletionCollator
from reftune.data.formats import examples_of
from reftune.data.reading import RawRow
from reftune.data.tokenising import Encoding
from reftune.runs.recipe import TrainRecipe
from reftune.serving.user_rows import attach_store
from reftune.training.arguments import ReftTrainingArguments
from reftune.training.trainer import ReftTrainer
from reftune.users.run import run_users
from reftune.users.store import UserStore

EVERYBODY = "everybody"
EPOCHS, BATCH, NEW_TOKENS = 3, 2, 24
EDIT = {"method": "loreft", "positions": "l1+generated", "layers": list(range(18, 30))}
"""The upper twelve of SmolLM2's thirty layers, so that what lies below is computed once."""
OWN = "own adapters, r1"
KINDS: dict[str, dict[str, Any]] = {
    "one adapter for all, r4": {"rank": 4},
    OWN: {"rank": 1},
    "shared rotation, own bias, r4": {"rank": 4, "share": "rotation"},
}
LORA = "LoRA r1 each"
RATES: dict[str, list[dict[str, float]]] = {
    "one adapter for all, r4": [{"lr": 1e-3}, {"lr": 4e-3}, {"lr": 1.2e-2}],
    OWN: [{"lr": 4e-3}, {"lr": 1.2e-2}, {"lr": 3.6e-2}],
    "shared rotation, own bias, r4": [{"lr": 2e-3, "bias_lr": 2e-3 * times} for times in (10, 50, 250, 1250)],
    LORA: [{"lr": 3e-3}, {"lr": 1e-2}, {"lr": 3e-2}],
}
Rows = dict[str, dict[str, list[dict[str, str]]]]


@dataclass(frozen=True)
class Figures:
    """Of one method: the users' mean held-out loss (nats a token), share of answers with the habit, CPU s and bytes."""

    loss: float
    habit: float
    seconds: float
    bytes: float
    users: int


def drawn(seed: int, every: int = 1) -> Rows:
    """Each user's rows by part; every so many users alone."""
    return {f"user-{number:02}": rows_of(habit, seed) for number, habit in enumerate(HABITS) if number % every == 0}


@cache
def loaded() -> tuple[Any, Any]:
    return reftune.models.load("smollm2", device="cpu")


@contextmanager
def cpu(taken: list[float]) -> Iterator[None]:
    begun = time.process_time()
    yield
    taken.append(time.process_time() - begun)


def train_store(rows: Rows, kind: str, rates: Mapping[str, float], seed: int, folder: Path) -> None:
    """Train into the store ``folder/store``."""
    folder.mkdir(parents=True, exist_ok=True)
    file, alike = folder / "rows.jsonl", kind.startswith("one adapter")
    lines = [{"user": EVERYBODY if alike else user, **row} for user, own in rows.items() for row in own["train"]]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = {**EDIT, **KINDS[kind], **rates, "epochs": EPOCHS, "batch_size": BATCH, "seed": seed, "device": "cpu"}
    run_users(TrainRecipe(train_file=str(file), adapter_column="user", output=str(folder / "store"), **settings))


def encoded(rows: Sequence[Mapping[str, str]]) -> list[Any]:
    return list(Encoding(loaded()[1]).dataset(examples_of([RawRow("", 0, dict(row)) for row in rows])))


@torch.no_grad()
def row_losses(run: Callable[..., Any], rows: list[Any]) -> list[float]:
    """Each row's loss a completion token; ``run``: a forward."""
    batch = CompletionCollator(loaded()[1].pad_token_id)(rows)
    labels = batch.pop("labels")[:, 1:]
    scores = run(**batch).logits[:, :-1].float()
    losses = torch.nn.functional.cross_entropy(scores.mT, labels, ignore_index=-100, reduction="none")
    return (losses.sum(1) / (labels != -100).sum(1)).tolist()


def answers(run: Callable[..., Any], rows: list[Any]) -> list[str]:
    tokenizer = loaded()[1]
    prompts = [list(row["input_ids"][: row["prompt_length"]]) for row in rows]
    inputs = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    written = run(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    return [
        text.strip()
        for text in tokenizer.batch_decode(written[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    ]


def of_store(
    rows: Rows, part: str, name_of: Callable[[str], str], store: Path | None, writes: bool
) -> tuple[float, float]:
    """Mean loss over the users, and the share of their answers with the habit."""
    base, owners = loaded()[0], [user for user, own in rows.items() for _ in own[part]]
    tokens, habit = encoded([row for own in rows.values() for row in own[part]]), 0.0
    names = [name_of(user) for user in owners]
    with attach_store(base, store) if store else nothing():
        named = (lambda some: {"adapter_names": some}) if store else (lambda some: {})
        losses = []
        for begin in range(0, len(tokens), 32):
            some = slice(begin, begin + 32)
            losses += row_losses(partial(base, **named(names[some])), tokens[some])
        if writes:
            found = []
            for begin in range(0, len(tokens), 80):
                some = slice(begin, begin + 80)
                found += answers(partial(base.generate, **named(names[some])), tokens[some])
            habit = sum(HABITS[int(user[-2:])].has(text) for user, text in zip(owners, found, strict=True)) / len(found)
    return sum(losses) / len(losses), habit


@contextmanager
def nothing() -> Iterator[None]:
    yield


def lora(rows: Rows, part: str, lr: float, seed: int, writes: bool, folder: Path) -> Figures:
    """A LoRA each, one user after the other on the same base."""
    base, tokenizer = loaded()
    losses, habits, taken, size = [], [], [], 0
    for user, own in rows.items():
        torch.manual_seed(seed)
        model = get_peft_model(
            base, LoraConfig(r=1, lora_alpha=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        )
        size = sum(p.nbytes for p in model.parameters() if p.requires_grad)
        args = ReftTrainingArguments(
            output_dir=str(folder), num_train_epochs=EPOCHS, per_device_train_batch_size=BATCH, learning_rate=lr, seed=seed,
            report_to="none", disable_tqdm=True, use_cpu=True, save_strategy="no", prefix_reuse="off", logging_steps=10**6,
        )  # fmt: skip
        with cpu(taken):
            ReftTrainer(model=model, args=args, train_dataset=encoded(own["train"]), processing_class=tokenizer).train()
        model.eval()
        tokens = encoded(own[part])
        losses += row_losses(model, tokens)
        if writes:
            habits += [HABITS[int(user[-2:])].has(text) for text in answers(model.generate, tokens)]
        model.unload()
        gc.collect()
    return Figures(
        sum(losses) / len(losses), sum(habits) / max(1, len(habits)), sum(taken) / len(rows), size, len(rows)
    )


def figures(
    kind: str, rates: Mapping[str, float], rows: Rows, part: str, seed: int, folder: Path, writes: bool
) -> Figures:
    """Train and measure one method on some users."""
    if kind == LORA:
        return lora(rows, part, rates["lr"], seed, writes, folder)
    if kind == "base":
        return Figures(*of_store(rows, part, str, None, writes), 0.0, 0.0, len(rows))
    taken: list[float] = []
    with cpu(taken):
        train_store(rows, kind, rates, seed, folder)
    store = UserStore.open(folder / "store")
    alike = kind.startswith("one adapter")
    loss, habit = of_store(rows, part, (lambda user: EVERYBODY) if alike else str, store.path, writes)
    size = store.user_bytes / (len(rows) if alike else 1)
    return Figures(loss, habit, taken[0] / len(rows), size, len(rows))
