"""A recipe with `adapter_column` carried out: a file of many users' rows becomes a store of their edits."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from reftune.adapter.checkpoint import WEIGHTS_FILE
from reftune.adapter.starting import start_from
from reftune.data.formats import Example, examples_of
from reftune.data.reading import RawRow, read_rows
from reftune.data.splitting import split_rows
from reftune.errors import ReftuneError
from reftune.output import terminal
from reftune.output.files import replaced, write_text
from reftune.output.locks import only_writer, refuse_if_locked
from reftune.output.targets import check_folder_target
from reftune.runs.fingerprint import FINGERPRINT_FILE, base_digest, check_resumed, fingerprint, write_fingerprint
from reftune.runs.output_folder import METRICS_FILE, readable_disk_errors, write_recipe
from reftune.runs.plan import settings_line
from reftune.runs.recipe import BIAS_RATE, RUN_FILE, TrainRecipe
from reftune.runs.steps import TrainingInterrupted, attach_edit, encode_rows, load_base, training_arguments
from reftune.training.prefix.switch import PrefixSwitch
from reftune.training.progress import print_line, seconds_between_lines, time_left
from reftune.training.row_lengths import check_row_lengths
from reftune.users.cohort import Cohort, SharedPart, UserRows, computed_tokens
from reftune.users.names import INDEX_FILE, check_user_name, looks
from reftune.users.store import UserStore

RESULTS_FILE = "users.jsonl"
CHECKPOINT_FILE, SHARED_CHECKPOINT_FILE = ".cohort.pt", ".shared.pt"
_EVERY_SECONDS = 30.0
"""Between two checkpoints of a cohort."""
_TOKENS, _TOKENS_ON_A_GPU = 512, 8192
_OURS = (RUN_FILE, FINGERPRINT_FILE, METRICS_FILE, RESULTS_FILE, CHECKPOINT_FILE, SHARED_CHECKPOINT_FILE)
_STORES = (f"{INDEX_FILE}*", "users-*.safetensors", "shared-*.safetensors")


@dataclass(frozen=True)
class UsersRun:
    """What training many users left: the store's folder, what its `metrics.json` holds, and a line for each user."""

    folder: Path
    metrics: dict[str, Any]

    @property
    def results(self) -> Path:
        """Of each user: rows, steps, losses."""
        return self.folder / RESULTS_FILE


def run_users(recipe: TrainRecipe, console: Console | None = None) -> UsersRun:
    """Train an edit for each user of a file, as if each were alone, and keep them in the store ``recipe.output``.

    Args:
        recipe: with ``adapter_column``.
        console: where the progress is printed; standard error by default.

    Raises:
        ReftuneError: anything the user can mend, naming the row or the field; nothing has been changed then.
        TrainingInterrupted: after Ctrl-C; the users that are done are in the store.
    """
    console = console or terminal.console(stderr=True, quiet=recipe.quiet)
    output = Path(recipe.output).expanduser()
    _check_output(recipe, output)
    examples = read_users(recipe)
    train, held = (sum(len(own[which]) for own in examples.values()) for which in (0, 1))
    print_line(console, f"{len(examples):,} users, {train:,} rows; {held:,} rows held out")
    transformers.set_seed(recipe.seed)
    base, tokenizer = load_base(recipe)
    digest = base_digest(base)
    recipe = recipe.fitted(base)
    model = attach_edit(base, recipe)
    if recipe.init_from:
        start_from(model, recipe.init_from)
    users, found, rows = encoded_users(recipe, model, tokenizer, examples)
    recipe = recipe.fitted(model.get_base_model(), rows)
    found = {**found, "model": digest, "dtype": str(base.dtype)}
    whose = "of each user" if recipe.share is None else "that all share, but for each user's bias"
    print_line(console, f"{settings_line(recipe, model)} {whose}; learning rate {recipe.lr:g}")
    begun = time.monotonic()
    prefixes = PrefixSwitch(recipe.prefix_reuse, None, [user.train for user in users])
    training = Training(recipe, model, tokenizer.pad_token_id, prefixes, output, users)
    with readable_disk_errors(output):
        training.cohort(users[:1]).remove()  # what it refuses, before any change
        store = _begin(recipe, output, model, found)
        with only_writer(output):
            try:
                training.run(store, console)
            except KeyboardInterrupt as interrupt:
                raise TrainingInterrupted(
                    f"Interrupted: {len(store)} of {len(users)} users are in {output}. Go on with: reftune train "
                    f"{output}/{RUN_FILE} --resume"
                ) from interrupt
            metrics = _metrics(output, users, training, time.monotonic() - begun)
            write_text(output / METRICS_FILE, json.dumps(metrics, indent=2) + "\n")
    prefixes.close()
    return UsersRun(output, metrics)


# Rows


def read_users(recipe: TrainRecipe) -> dict[str, tuple[list[Example], list[Example]]]:
    """Each user's rows to train on and held-out rows, in the order in which users first appear.

    Raises:
        ReftuneError: naming file, row and column; or a user who lacks rows.
    """
    train = by_user(recipe, read_rows(recipe.train_file, split=recipe.split)[: recipe.limit_rows])
    held_out = None
    if recipe.eval_file:
        held_out = by_user(recipe, read_rows(recipe.eval_file, split=recipe.split)[: recipe.limit_rows])
    for user in held_out or ():
        if user not in train:
            raise ReftuneError(f"{recipe.eval_file}: user {user!r} has no rows to train on in {recipe.train_file}.")
    found = {}
    for user, rows in train.items():
        if held_out is not None and user not in held_out:
            raise ReftuneError(f"user {user!r} has no held-out rows in {recipe.eval_file}; add some, or leave it out.")
        try:
            found[user] = split_rows(
                rows,
                eval_fraction=recipe.eval_fraction,
                eval_rows=None if held_out is None else held_out[user],
                seed=recipe.seed,
            )
        except ReftuneError as error:
            raise ReftuneError(f"user {user!r}: {error}") from None
    return found


def by_user(recipe: TrainRecipe, given: Sequence[RawRow]) -> dict[str, list[Example]]:
    """Rows by the name in their ``adapter_column``.

    Raises:
        ReftuneError: a row without one, or names that are none or too much alike.
    """
    column, columns = str(recipe.adapter_column), recipe.columns if isinstance(recipe.columns, dict) else None
    rows: dict[str, list[RawRow]] = {}
    alike: dict[str, tuple[str, str]] = {}
    for row in given:
        name = _user_of(row, column)
        first, where = alike.setdefault(looks(name), (name, row.where))
        if first != name:
            raise ReftuneError(
                f"{row.where}: user {name!r} and {first!r} ({where}) are too much alike; write a name in one way."
            )
        rows.setdefault(name, []).append(row)
    return {user: examples_of(own, columns=columns) for user, own in rows.items()}


def _user_of(row: RawRow, column: str) -> str:
    if column not in row.values:
        present = ", ".join(map(str, row.values))
        raise ReftuneError(f"{row.where}: adapter_column={column!r} is missing; this row has: {present}.")
    value = row.values[column]
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        raise ReftuneError(
            f"{row.where}: {column!r} is {value!r}, which names no user: write a name or a whole number."
        )
    try:
        return check_user_name(str(value))
    except ReftuneError as error:
        raise ReftuneError(f"{row.where}: {error}") from None


def encoded_users(
    recipe: TrainRecipe, model: PeftModel, tokenizer: Any, examples: dict[str, tuple[list[Example], list[Example]]]
) -> tuple[list[UserRows], dict[str, str], Any]:
    """The users' rows as tokens, digests of them, and all that are trained on."""
    parts = []
    for which in (0, 1):
        encoded = encode_rows([row for own in examples.values() for row in own[which]], recipe, tokenizer)
        check_row_lengths(model, encoded)
        parts.append(encoded)
    streams = [iter(() if encoded is None else encoded) for encoded in parts]
    users = [
        UserRows(name, *([next(stream) for _ in own] for stream, own in zip(streams, both, strict=True)))
        for name, both in examples.items()
    ]
    names = json.dumps([(name, len(train), len(held)) for name, (train, held) in examples.items()]).encode()
    digests = fingerprint(parts[0], parts[1], "")
    return users, {**digests, "adapter_column": hashlib.blake2b(names, digest_size=16).hexdigest()}, parts[0]


# The folder


def _check_output(recipe: TrainRecipe, output: Path) -> None:
    """Where the store will be; nothing is changed yet."""
    check_folder_target(output, "output=", (INDEX_FILE,), [recipe.train_file, recipe.eval_file], recipe.model)
    refuse_if_locked(output)
    there = (output / INDEX_FILE).is_file()
    if (output / WEIGHTS_FILE).exists() or next(output.glob("checkpoint-*"), None) is not None:
        raise ReftuneError(f"output={recipe.output!r} holds an adapter of one run; name another folder.")
    if recipe.resume and not there:
        raise ReftuneError(f"resume: {output} holds no store of users; train without --resume.")
    if there and not recipe.resume and not recipe.overwrite:
        raise ReftuneError(
            f"output={recipe.output!r} holds a store of {len(UserStore.open(output))} users: go on with --resume, "
            "start again with --overwrite, or name another folder."
        )


def _begin(recipe: TrainRecipe, output: Path, model: PeftModel, found: dict[str, str]) -> UserStore:
    """The store to write into: the one that is there, checked, or a new one **in place of what is there**."""
    if recipe.resume:
        check_resumed(recipe, output, found)
        return UserStore.open(output)
    if (output / INDEX_FILE).is_file():
        with only_writer(output):
            for pattern in (*_STORES, *_OURS):
                for old in output.glob(pattern):
                    old.unlink()
    config = model.peft_config[model.active_adapters[0]].to_dict()
    store = UserStore.create(output, config, config.get("base_model_name_or_path") or recipe.model)
    write_recipe(recipe, output)
    write_fingerprint(output, found)
    return store


def _metrics(output: Path, users: Sequence[UserRows], training: Training, seconds: float) -> dict[str, Any]:
    lines = (output / RESULTS_FILE).read_text(encoding="utf-8").splitlines()
    records = {record["user"]: record for record in map(json.loads, lines)}
    held_out = [record["eval_loss"] for record in records.values() if record["eval_loss"] is not None]
    return {
        "users": len(users),
        "trainable_parameters": sum(p.numel() for p in training.model.parameters() if p.requires_grad),
        "train_loss": sum(record["train_loss"] for record in records.values()) / len(records),
        "eval_loss": sum(held_out) / len(held_out) if held_out else None,
        "seconds": seconds,
        "prefix_reuse": training.prefixes.status,
    }


# Training


@dataclass
class Training:
    """The users of a file, in training: how, and what of."""

    recipe: TrainRecipe
    model: PeftModel
    pad_token_id: int
    prefixes: PrefixSwitch
    output: Path
    users: Sequence[UserRows]

    def __post_init__(self) -> None:
        recipe = replace(self.recipe, tensorboard=False)
        rows, evaluates = max(len(user.train) for user in self.users), bool(self.users[0].held_out)
        self.bias_lr = recipe.bias_lr or BIAS_RATE * float(recipe.lr)
        self.shared_args = training_arguments(recipe, self.output, rows, evaluates)
        own = {} if recipe.share is None else {"learning_rate": self.bias_lr}
        self.args = training_arguments(recipe, self.output, rows, evaluates, **own)

    def cohort(self, users: Sequence[UserRows]) -> Cohort:
        """Some users, to be trained together."""
        return Cohort(
            self.model, users, self.args, self.pad_token_id, self.prefixes, self.tokens, self.recipe.patience,
            shared=self.recipe.share is not None,
        )  # fmt: skip

    @property
    def tokens(self) -> int:
        """Of one forward."""
        on_cpu = next(self.model.parameters()).device.type == "cpu"
        return self.recipe.cohort_tokens or (_TOKENS if on_cpu else _TOKENS_ON_A_GPU)

    def run(self, store: UserStore, console: Console) -> None:
        """Train whoever is not in the store yet; first what they share, where that is not there."""
        if self.recipe.share is not None:
            if not store.has_shared:
                self.share(store, console)
            use_shared(self.model, store)
        there = set(store.names())
        left = [user for user in self.users if user.name not in there]
        with progress(console, "users", len(self.users), len(self.users) - len(left)) as advance:
            for some in self.cohorts(left):
                self.prefixes.next_pass()
                self.train(store, some)
                advance(len(some))
        (self.output / CHECKPOINT_FILE).unlink(missing_ok=True)

    def cohorts(self, users: Sequence[UserRows]) -> Iterator[list[UserRows]]:
        """Users of about as many steps together, as many as the budget of tokens holds batches of."""
        size = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        found: list[UserRows] = []
        held = 0.0
        for user in sorted(users, key=lambda user: -len(user.train)):
            tokens = sum(computed_tokens(self.model, row, self.prefixes) for row in user.train)
            cost = tokens / len(user.train) * min(size, len(user.train))
            if found and held + cost > self.tokens:
                yield found
                found, held = [], 0.0
            found.append(user)
            held += cost
        if found:
            yield found

    def share(self, store: UserStore, console: Console) -> None:
        """Train what users share, and put it into the store, with their mean bias to begin with."""
        shared = SharedPart(
            self.model, self.users, self.shared_args, self.pad_token_id, self.prefixes, self.tokens,
            self.recipe.patience, bias_lr=self.bias_lr,
        )  # fmt: skip
        try:
            run = _resumed(shared, self.output / SHARED_CHECKPOINT_FILE)
            with progress(console, "steps of the shared part", shared.course.total, shared.course.done) as advance:
                run(lambda: advance(1))
        finally:
            shared.remove(learnt=shared.course.stopped)
        store.write_shared(get_peft_model_state_dict(self.model))
        (self.output / SHARED_CHECKPOINT_FILE).unlink(missing_ok=True)

    def train(self, store: UserStore, users: list[UserRows]) -> None:
        """Train a cohort, from its checkpoint where there is one, and put it into the store."""
        cohort = self.cohort(users)
        try:
            _resumed(cohort, self.output / CHECKPOINT_FILE)(lambda: None)
            with (self.output / RESULTS_FILE).open("a", encoding="utf-8") as results:
                results.writelines(json.dumps(course.result()) + "\n" for course in cohort.courses)
                results.flush()
                os.fsync(results.fileno())
            store.write_stacked([user.name for user in users], cohort.stack.stacked_tensors())
        finally:
            cohort.remove()


def use_shared(model: PeftModel, store: UserStore) -> None:
    """Give a model's adapter what a store's users share; the bias alone is trained (from 0 where none is shared)."""
    missing = {n: torch.zeros_like(t) for n, t in get_peft_model_state_dict(model).items() if n.endswith(".bias")}
    set_peft_model_state_dict(model, {**missing, **store.shared()})
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and name.endswith(".bias"))


def _resumed(cohort: Cohort, checkpoint: Path) -> Callable[[Callable[[], None]], None]:
    """A cohort at its checkpoint, where that is there: what trains it to the end, and writes one now and then."""
    if checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=True)
        if state["users"] == [course.rows.name for course in cohort.courses]:
            cohort.load_state(state)
    saved = time.monotonic()

    def run(after_step: Callable[[], None]) -> None:
        def save_now_and_then() -> None:
            nonlocal saved
            after_step()
            if time.monotonic() - saved > _EVERY_SECONDS:
                with replaced(checkpoint) as partial:
                    torch.save(cohort.state(), partial)
                saved = time.monotonic()

        cohort.run(save_now_and_then)

    return run


@contextmanager
def progress(console: Console, what: str, total: int, done: int) -> Iterator[Any]:
    """What is done and the time left: a bar on a terminal, else a line now and then."""
    if console.is_terminal:
        columns = TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(what, total=total, completed=done)
            yield lambda more: bar.advance(task, more)
        return
    every = seconds_between_lines()
    begun = last = time.monotonic()
    here = 0

    def tell(more: int) -> None:
        nonlocal here, last
        here += more
        left, now = total - done - here, time.monotonic()
        if now - last >= every or not left:
            last = now
            print_line(console, f"{what} {done + here}/{total}  {left} left  {time_left(now - begun, here, left)}")

    yield tell
