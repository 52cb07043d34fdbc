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

    def next_rows(self) -> list[Row]:
        """The rows of the next step."""
        epoch, step = divmod(self.done, self.per_epoch)
        if step == 0 or not self._epoch:
            self.order.set_epoch(epoch)
            self._epoch = list(self.order)
        size = self.order.batch_size
        return [self.rows.train[index] for index in self._epoch[step * size : (step + 1) * size]]

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
    ) -> None:
        if (reason := unsupported_reason(model) or _unsupported(args)) is not None:
            raise ReftuneError(f"Users cannot be trained together: {reason}.")
        self.model, self.args, self.prefixes, self.tokens, self.patience = model, args, prefixes, tokens, patience
        self.collate = CompletionCollator(pad_token_id)
        self.device = next(model.parameters()).device
        self.batch_size = args.per_device_train_batch_size * args.gradient_accumulation_steps
        self.courses = [self._course(rows) for rows in users]
        self.stack = Stack(model, len(users))
        decayed = set(ReftTrainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
        self.optimizer = RowAdamW(
            list(self.stack.parameters.values()), [name in decayed for name in self.stack.parameters], len(users), args
        )
        self.best = self.optimizer.rows()

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
        held_out = [user for user, course in enumerate(self.courses) if course.best_loss is not None]
        if held_out:
            users = torch.tensor(held_out, device=self.device)
            self.optimizer.set_rows(users, self.best[users])
        self.model.eval()

    def step(self) -> Float[Tensor, " users"]:
        """One step of everybody who is not done.

        Returns:
            Each user's loss; 0 for those who took no step.

        Raises:
            ReftuneError: a loss or an edit is not finite; the message names the user.
        """
        active = self.active
        self.model.train()
        batches = {user: self.courses[user].next_rows() for user in active}
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
            course = self.courses[user]
            course.done, course.loss_sum = course.done + 1, course.loss_sum + loss
            course.stopped = course.done == course.total
        self._evaluate([user for user in active if self._ends_epoch(self.courses[user])])
        return losses

    def _ends_epoch(self, course: Course) -> bool:
        ends = course.done % course.per_epoch == 0 or course.done == course.total
        return ends and bool(course.rows.held_out)

    def _evaluate(self, users: list[int]) -> None:
        """The held-out losses of some users; their best edits are kept, and whoever has got no better is stopped."""
        if not users:
            return
        now = self.optimizer.rows()
        for user, loss in zip(users, self.held_out_losses(users), strict=True):
            course = self.courses[user]
            if course.best_loss is None or loss < course.best_loss:
                course.best_loss, course.best_step, course.worse = loss, course.done, 0
                self.best[user] = now[user]
            else:
                course.worse += 1
                course.stopped |= self.patience is not None and course.worse >= self.patience

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

    def _refuse_divergence(self, losses: Tensor, active: list[int]) -> None:
        fine = torch.isfinite(losses) & torch.isfinite(self.optimizer.mean).all(dim=1)
        for parameter in self.optimizer.parameters:
            fine &= torch.isfinite(parameter.detach()).view(self.stack.users, -1).all(dim=1)
        if not bool(fine.all()):
            user = self.courses[next(user for user in active if not fine[user])]
            raise ReftuneError(
                f"Training of user {user.rows.name!r} diverged at step {user.done + 1}. Lower the learning rate "
                f"({self.args.learning_rate:g}), warm it up, or use float32."
            )

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
            for name, value in record.items():
                setattr(course, name, value)
        self.optimizer.set_rows(torch.arange(self.stack.users), state["rows"].to(self.device))
        self.best = state["best"].to(self.device)
        for name, tensor in self.optimizer.state().items():
            tensor.copy_(state[name])
        torch.set_rng_state(state["random"])

    def remove(self) -> None:
        """Put the model's own adapter back."""
        self.stack.remove()


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
