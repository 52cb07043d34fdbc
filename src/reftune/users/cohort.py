"""A cohort: several users trained in the same forwards, each exactly as if alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import ceil
from typing import Any

import torch
from jaxtyping import Float, Int
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import get_scheduler
from transformers.trainer_pt_utils import get_length_grouped_indices

from reftune.data.collating import CompletionCollator
from reftune.engine.hooks import Engine
from reftune.errors import ReftuneError
from reftune.training.loss import IGNORED_LABEL
from reftune.training.prefix.shared_beginning import first_in_tail
from reftune.training.prefix.switch import PrefixSwitch
from reftune.training.sampling import LengthGroupedByEpoch
from reftune.training.supervised_logits import plain_model, unsupported_reason
from reftune.training.trainer import ReftTrainer
from reftune.users.stack import RowAdamW, Stack

Row = Mapping[str, Any]


@dataclass(frozen=True)
class UserRows:
    """One user's rows, tokenised; there may be no held-out ones."""

    name: str
    train: Sequence[Row]
    held_out: Sequence[Row] = ()


@dataclass
class Course:
    """How far one user has come.

    Attributes:
        rows: the user's.
        order: the order of an epoch's rows.
        per_epoch: steps of an epoch.
        total: steps of the whole training.
        rates: the learning rate of each step.
        done: steps taken.
        loss_sum: of the steps' losses.
        best_loss: the least held-out loss, at the end of an epoch; None before.
        best_step: when that was.
        worse: evaluations since then.
        stopped: whether there will be no further step.
    """

    rows: UserRows
    order: LengthGroupedByEpoch
    per_epoch: int
    total: int
    rates: list[float]
    done: int = 0
    loss_sum: float = 0.0
    best_loss: float | None = None
    best_step: int = 0
    worse: int = 0
    stopped: bool = False
    _epoch: list[int] = field(default_factory=list)

    @property
    def ends_epoch(self) -> bool:
        """Whether the steps taken are whole epochs, or all."""
        return self.done % self.per_epoch == 0 or self.done == self.total

    def next_rows(self) -> list[int]:
        """The rows of the next step, by number."""
        epoch, step = divmod(self.done, self.per_epoch)
        if step == 0 or not self._epoch:
            self.order.set_epoch(epoch)
            self._epoch = list(self.order)
        size = self.order.batch_size
        return self._epoch[step * size : (step + 1) * size]

    def take(self, loss: float) -> None:
        """Count a step."""
        self.done, self.loss_sum = self.done + 1, self.loss_sum + loss
        self.stopped = self.done == self.total

    def judge(self, loss: float, patience: int | None) -> bool:
        """Note a held-out loss; returns whether it is the least, and stops whoever has got no better for long."""
        if self.best_loss is None or loss < self.best_loss:
            self.best_loss, self.best_step, self.worse = loss, self.done, 0
            return True
        self.worse += 1
        self.stopped |= patience is not None and self.worse >= patience
        return False

    def result(self) -> dict[str, Any]:
        """What the training came to."""
        steps = max(self.done, 1)
        return {
            "user": self.rows.name, "train_rows": len(self.rows.train), "eval_rows": len(self.rows.held_out),
            "steps": self.done, "train_loss": self.loss_sum / steps, "eval_loss": self.best_loss,
            "best_step": self.best_step or self.done,
        }  # fmt: skip

    def record(self) -> dict[str, Any]:
        """What changes in training."""
        names = ("done", "loss_sum", "best_loss", "best_step", "worse", "stopped")
        return {name: getattr(self, name) for name in names}

    def load(self, record: Mapping[str, Any]) -> None:
        """Go on from a ``record``."""
        for name, value in record.items():
            setattr(self, name, value)


class Cohort:
    """Trains several users' edits in the same forwards, each as `ReftTrainer` would train it alone.

    Every user begins at the model's adapter as it is, and has the row order, number of steps, learning rates, clipping,
    moments, best epoch and end that `ReftTrainer` gives to its rows by themselves under the same arguments. A step
    takes the next batch of everybody who is not done; the loss is the sum of the users' own. **Changes the model**
    until ``remove``.

    Args:
        model: a PEFT model with one ReFT adapter.
        users: their rows; names are for messages.
        args: as for `ReftTrainer`: AdamW, rows grouped by length.
        pad_token_id: what fills short rows.
        prefixes: what is computed once; it may serve one cohort after another.
        tokens: most tokens of one forward and its backward, where one user's batch does not alone hold more.
        patience: stop a user after so many evaluations without a lower held-out loss; None: never.
        shared: whether the users' biases alone are their own (and all else is not trained here).

    Raises:
        ReftuneError: settings or a model with which users cannot be trained together.
    """

    def __init__(
        self,
        model: PeftModel,
        users: Sequence[UserRows],
        args: Any,
        pad_token_id: int,
        prefixes: PrefixSwitch,
        tokens: int | None = None,
        patience: int | None = None,
        shared: bool = False,
    ) -> None:
        if (reason := unsupported_reason(model) or _unsupported(args)) is not None:
            raise ReftuneError(f"Users cannot be trained together: {reason}.")
        self.model, self.args, self.prefixes, self.tokens, self.patience = model, args, prefixes, tokens, patience
        self.collate = CompletionCollator(pad_token_id)
        self.device = next(model.parameters()).device
        self.batch_size = args.per_device_train_batch_size * args.gradient_accumulation_steps
        self.courses = [self._course(rows) for rows in users]
        self.stack = Stack(model, len(users), shared)
        self.optimizer = self._optimizer(self.stack.parameters, len(users))
        self.best = self.optimizer.rows()

    def _optimizer(self, parameters: Mapping[str, nn.Parameter], users: int) -> RowAdamW:
        decayed = set(ReftTrainer.get_decay_parameter_names(None, self.model))  # type: ignore[arg-type]
        return RowAdamW(list(parameters.values()), [name in decayed for name in parameters], users, self.args)

    def _course(self, user: UserRows) -> Course:
        if not user.train:
            raise ReftuneError(f"user {user.name!r} has no rows to train on")
        lengths, held_out = ([len(row["input_ids"]) for row in rows] for rows in (user.train, user.held_out))
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        if held_out:  # Trainer groups by length in evaluation too, in one order for good
            drawn, size = torch.Generator().manual_seed(seed), self.args.per_device_eval_batch_size
            order = get_length_grouped_indices(held_out, size, generator=drawn)
            user = replace(user, held_out=[user.held_out[index] for index in order])
        per_epoch = ceil(len(lengths) / self.batch_size)
        total = ceil(self.args.num_train_epochs * per_epoch)
        rates = learning_rates(self.args, total)
        return Course(user, LengthGroupedByEpoch(lengths, self.batch_size, seed), per_epoch, total, rates)

    @property
    def active(self) -> list[int]:
        """Who has further steps to take."""
        return [user for user, course in enumerate(self.courses) if not course.stopped]

    def run(self, after_step: Callable[[], None] = lambda: None) -> None:
        """Take every step that is left, and leave the model with the best of each user's edits.

        Raises:
            ReftuneError: a user's training diverged.
        """
        while self.active:
            self.step()
            after_step()
        self._take_best()
        self.model.eval()

    def _take_best(self) -> None:
        held_out = [user for user, course in enumerate(self.courses) if course.best_loss is not None]
        if held_out:
            users = torch.tensor(held_out, device=self.device)
            self.optimizer.set_rows(users, self.best[users])

    def step(self) -> Float[Tensor, " losses"]:
        """One step of everybody who is not done.

        Returns:
            Each user's loss; 0 for those who took no step.

        Raises:
            ReftuneError: a loss or an edit is not finite; the message names the user.
        """
        active = self.active
        self.model.train()
        batches = {user: [self.courses[user].rows.train[i] for i in self.courses[user].next_rows()] for user in active}
        rows = [(user, row) for user in active for row in batches[user]]
        learnt = torch.tensor([sum(map(_learnt, batches.get(user, ()))) or 1 for user in range(self.stack.users)])
        losses = torch.zeros(self.stack.users, device=self.device)
        for part in self._forwards(rows):
            found = self._loss_sums(part, torch.tensor([user for user, _ in part])) / learnt.to(self.device)
            found.sum().backward()
            losses = losses + found.detach()
        users = torch.tensor(active, device=self.device)
        rates = [self.courses[user].rates[self.courses[user].done] for user in active]
        self.optimizer.step(users, self.optimizer.mean.new_tensor(rates))
        self._refuse_divergence(losses, active)
        for user, loss in zip(active, losses[users].tolist(), strict=True):
            self.courses[user].take(loss)
        self._evaluate([user for user in active if self.courses[user].ends_epoch and self.courses[user].rows.held_out])
        return losses

    def _evaluate(self, users: list[int]) -> None:
        """The held-out losses of some users; their best edits are kept, and whoever has got no better is stopped."""
        if not users:
            return
        now = self.optimizer.rows()
        for user, loss in zip(users, self.held_out_losses(users), strict=True):
            if self.courses[user].judge(loss, self.patience):
                self.best[user] = now[user]

    @torch.no_grad()
    def held_out_losses(self, users: Sequence[int]) -> list[float]:
        """Some users' losses on their held-out rows: the mean over batches, each weighted by its rows."""
        self.model.eval()
        size = self.args.per_device_eval_batch_size
        batches = [
            (user, self.courses[user].rows.held_out[start : start + size])
            for user in users
            for start in range(0, len(self.courses[user].rows.held_out), size)
        ]
        rows = [(index, user, row) for index, (user, batch) in enumerate(batches) for row in batch]
        sums = torch.zeros(len(batches), device=self.device)
        for part in self._forwards([(user, row) for _, user, row in rows]):
            groups, rows = torch.tensor([index for index, _, _ in rows[: len(part)]]), rows[len(part) :]
            sums = sums + self._loss_sums(part, groups, len(batches))
        means = (sums / torch.tensor([sum(map(_learnt, batch)) for _, batch in batches], device=sums.device)).tolist()
        self.model.train()
        return [
            sum(mean * len(batch) for mean, (owner, batch) in zip(means, batches, strict=True) if owner == user)
            / len(self.courses[user].rows.held_out)
            for user in users
        ]

    def _forwards(self, rows: list[tuple[int, Row]]) -> list[list[tuple[int, Row]]]:
        """Rows in their order, as many together as the budget of tokens allows; a user's batch is never parted."""
        if self.tokens is None:
            return [rows]
        parts: list[list[tuple[int, Row]]] = []
        held = 0
        for index, (user, row) in enumerate(rows):
            cost = computed_tokens(self.model, row, self.prefixes)
            if not parts or (held + cost > self.tokens and rows[index - 1][0] != user):
                parts.append([])
                held = 0
            parts[-1].append((user, row))
            held += cost
        return parts

    def _loss_sums(
        self, rows: list[tuple[int, Row]], groups: Int[Tensor, " rows"], count: int | None = None
    ) -> Float[Tensor, " groups"]:
        """The losses of rows, summed over the tokens of each group of rows; by default a user is a group."""
        batch: dict[str, Any] = {
            name: value.to(self.device) for name, value in self.collate([r for _, r in rows]).items()
        }
        batch["intervention_directions"] = self.stack.directions(
            torch.tensor([user for user, _ in rows], device=self.device)
        )
        found = self.prefixes.forward(self.model, batch)
        scores = found.logits.to(torch.promote_types(found.logits.dtype, torch.float32)).flatten(0, 1)
        losses = cross_entropy(scores, found.targets.flatten(), reduction="none")
        owners = groups.to(losses.device)[found.rows.to(losses.device)]
        return losses.new_zeros(count or self.stack.users).index_add(0, owners, losses)

    def _refuse_divergence(self, losses: Tensor, active: Sequence[int]) -> None:
        fine = torch.isfinite(losses) & torch.isfinite(self.optimizer.mean).all(dim=1)
        for parameter in self.optimizer.parameters:
            fine &= torch.isfinite(parameter.detach()).view(self.stack.users, -1).all(dim=1)
        if not bool(fine.all()):
            user = self.courses[next(user for user in active if not fine[user])]
            raise _diverged(f"user {user.rows.name!r}", user.done + 1, self.args.learning_rate)

    def state(self) -> dict[str, Any]:
        """Everything a checkpoint needs to go on to the bit (but for what prefix reuse rounds)."""
        return {
            "users": [course.rows.name for course in self.courses],
            "courses": [course.record() for course in self.courses],
            "rows": self.optimizer.rows(),
            "best": self.best,
            "random": torch.get_rng_state(),
            **self.optimizer.state(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take up where ``state`` was."""
        for course, record in zip(self.courses, state["courses"], strict=True):
            course.load(record)
        self.best = _load(self.optimizer, state)
        torch.set_rng_state(state["random"])

    def remove(self, learnt: bool = False) -> None:
        """Put the model's own adapter back, with what users learnt in common where that is asked for."""
        self.stack.remove(learnt)


class SharedPart(Cohort):
    """Trains what users have in common, and a bias of each, on the rows of all as one file.

    A step takes the next rows of everybody's, in the order and with the loss that `ReftTrainer` has for such a file,
    the mean over the tokens of the batch. Then the shared tensors take a step of AdamW, clipped by themselves; and so
    does the bias of every user who has rows in the batch, with moments and a count of its own, so that how many others
    there are does not matter to it. The held-out loss is the mean of the users'; the best epoch is kept.

    Args:
        bias_lr: the biases' peak learning rate; ``args.learning_rate`` is the shared tensors'.

    ``remove(learnt=True)`` leaves the shared tensors and the users' mean bias in the model's adapter.

    Raises:
        ReftuneError: as ``Cohort``, or edits without a bias of their own.
    """

    def __init__(self, *args: Any, bias_lr: float, **options: Any) -> None:
        super().__init__(*args, **options, shared=True)
        users = [course.rows for course in self.courses]
        self.rows = [(number, row) for number, user in enumerate(users) for row in user.train]
        self.course = self._course(UserRows("", [row for _, row in self.rows]))
        self.bias_rates = [rate * bias_lr / self.args.learning_rate for rate in self.course.rates]
        self.common = self._optimizer(self.stack.common, 1)
        self.best_common = self.common.rows()

    @property
    def active(self) -> list[int]:
        """Whether there are further steps to take: everybody, or nobody."""
        return [] if self.course.stopped else list(range(self.stack.users))

    def step(self) -> Float[Tensor, " losses"]:
        """One step; returns its loss.

        Raises:
            ReftuneError: as ``Cohort``.
        """
        self.model.train()
        rows = [self.rows[index] for index in self.course.next_rows()]
        learnt, loss = sum(_learnt(row) for _, row in rows) or 1, torch.zeros(1, device=self.device)
        for part in self._forwards(rows):
            found = self._loss_sums(part, torch.zeros(len(part), dtype=torch.long), 1) / learnt
            found.sum().backward()
            loss = loss + found.detach()
        users = torch.tensor(sorted({user for user, _ in rows}), device=self.device)
        done, like = self.course.done, self.optimizer.mean
        self.optimizer.step(users, like.new_full((len(users),), self.bias_rates[done]))
        self.common.step(users.new_zeros(1), like.new_full((1,), self.course.rates[done]))
        if not all(bool(found.isfinite().all()) for found in (loss, self.common.mean, self.common.rows())):
            raise _diverged("the shared part", done + 1, self.args.learning_rate)
        self._refuse_divergence(loss.expand(self.stack.users), users.tolist())
        self.course.take(loss.item())
        if self.course.ends_epoch and self.courses[0].rows.held_out:
            losses = self.held_out_losses(range(self.stack.users))
            if self.course.judge(sum(losses) / len(losses), self.patience):
                self.best, self.best_common = self.optimizer.rows(), self.common.rows()
        return loss

    def _take_best(self) -> None:
        if self.course.best_loss is not None:
            self.optimizer.set_rows(torch.arange(self.stack.users, device=self.device), self.best)
            self.common.set_rows(torch.zeros(1, dtype=torch.long, device=self.device), self.best_common)

    def state(self) -> dict[str, Any]:
        """As for ``Cohort``."""
        common = {"rows": self.common.rows(), "best": self.best_common, **self.common.state()}
        return {**super().state(), "course": self.course.record(), "common": common}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """As for ``Cohort``."""
        super().load_state(state)
        self.course.load(state["course"])
        self.best_common = _load(self.common, state["common"])


def _load(optimizer: RowAdamW, state: Mapping[str, Any]) -> Tensor:
    """Give an optimizer and its parameters what a state holds; returns the best rows."""
    device = optimizer.mean.device
    optimizer.set_rows(torch.arange(optimizer.users, device=device), state["rows"].to(device))
    for name, tensor in optimizer.state().items():
        tensor.copy_(state[name])
    return state["best"].to(device)


def _diverged(who: str, step: int, rate: float) -> ReftuneError:
    return ReftuneError(
        f"Training of {who} diverged at step {step}. Lower the learning rate ({rate:g}), warm it up, or use float32."
    )


def learning_rates(args: Any, steps: int) -> list[float]:
    """The learning rate of each step of a training of so many."""
    warmup, more = args.get_warmup_steps(steps), tuple(sorted((args.lr_scheduler_kwargs or {}).items()))
    return _rates(
        str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)), args.learning_rate, warmup, steps, more
    )


@lru_cache
def _rates(schedule: str, peak: float, warmup: int, steps: int, more: tuple[tuple[str, Any], ...]) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=peak)
    scheduler = get_scheduler(schedule, optimizer, warmup, steps, dict(more))
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def computed_tokens(model: PeftModel, row: Row, prefixes: PrefixSwitch) -> int:
    """How many of a row's tokens a step computes."""
    engine = Engine.of(plain_model(model))
    assert engine is not None
    positions = list(engine.active_positions().values())
    if prefixes.status != "on" or not all(position.spares_beginning for position in positions):
        return len(row["input_ids"])
    return len(row["input_ids"]) - first_in_tail(positions, row["prompt_length"], len(row["input_ids"]))


def _learnt(row: Row) -> int:
    return sum(label != IGNORED_LABEL for label in row["labels"][1:])


def _unsupported(args: Any) -> str | None:
    """Which of the arguments stands for something that is not done for many users at once, or None."""
    optimizer = str(getattr(args.optim, "value", args.optim))
    if not optimizer.startswith("adamw_torch") or optimizer not in ("adamw_torch", "adamw_torch_fused"):
        return f"optim={optimizer!r}, where AdamW alone steps each user by itself; leave it out"
    if args.train_sampling_strategy != "group_by_length":
        return f"train_sampling_strategy={args.train_sampling_strategy!r}; use 'group_by_length'"
    if str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)) in ("greedy", "reduce_lr_on_plateau"):
        return "their schedule goes by the held-out loss; use linear, cosine or constant"
    if args.label_smoothing_factor or args.neftune_noise_alpha:
        return "label smoothing and NEFTune are not done for many users"
    return None
