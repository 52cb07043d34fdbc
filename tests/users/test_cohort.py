"""Users trained together are the users trained alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model, get_peft_model_state_dict
from transformers import EarlyStoppingCallback

from reftune import ReftConfig
from reftune.data.collating import CompletionCollator
from reftune.training.arguments import ReftTrainingArguments
from reftune.training.prefix.switch import PrefixSwitch
from reftune.training.trainer import ReftTrainer
from reftune.users.cohort import Cohort, UserRows
from tests.tiny_models import TINY

BEGINNING = [5, 6, 7, 8, 9, 10]


def rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Rows that all begin alike, with prompts and completions of different lengths."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, size: int = 1) -> list[int]:
        return torch.randint(low, high, (size,), generator=generator).tolist()

    made = []
    for _ in range(count):
        prompt, completion = BEGINNING + draw(11, 90, draw(3, 9)[0]), draw(3, 90, draw(1, 6)[0])
        labels = [-100] * len(prompt) + completion
        made.append({"input_ids": prompt + completion, "labels": labels, "prompt_length": len(prompt)})
    return made


USERS = [
    UserRows("ann", rows(5, 1), rows(5, 11)),
    UserRows("bob", rows(2, 2), rows(3, 12)),
    UserRows("cy", rows(3, 3), rows(2, 13)),
]


def model(biases_alone: bool = False, **config: Any) -> Any:
    """A tiny model with an adapter in float64, always the same."""
    base = TINY["llama"]()
    torch.manual_seed(1)
    options = {"r": 2, "layers_to_transform": [0, 2], "task_type": "CAUSAL_LM", "init": "paper", **config}
    made = get_peft_model(base, ReftConfig(**options)).double()
    for name, parameter in made.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and (name.endswith(".bias") or not biases_alone))
    return made


def arguments(folder: Path, **settings: Any) -> ReftTrainingArguments:
    settings = {
        "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "num_train_epochs": 2, "learning_rate": 2e-2,
        "weight_decay": 0.1, "max_grad_norm": 0.2, "warmup_steps": 2, "logging_steps": 1, "report_to": "none",
        "disable_tqdm": True, "use_cpu": True, "save_strategy": "no", **settings,
    }  # fmt: skip
    return ReftTrainingArguments(output_dir=str(folder), **settings)


class Alone(ReftTrainer):
    """Keeps each step's loss in float64, which the log has in float32."""

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self.losses = [*getattr(self, "losses", []), loss.item()]
        return loss


def alone(user: UserRows, args: ReftTrainingArguments, config: dict[str, Any], patience: int | None = None) -> Any:
    run = Alone(
        model=model(**config), args=args, train_dataset=list(user.train), eval_dataset=list(user.held_out),
        data_collator=CompletionCollator(0),
        callbacks=[EarlyStoppingCallback(patience)] if patience else None,
    )  # fmt: skip
    run.train()
    return run


def together(args: ReftTrainingArguments, config: dict[str, Any], users: Any = USERS, **options: Any) -> Cohort:
    prefixes = PrefixSwitch(args.prefix_reuse, None, [[row for user in users for row in user.train]])
    return Cohort(model(**config), users, args, 0, prefixes, **options)


def of_user(cohort: Cohort, index: int) -> dict[str, torch.Tensor]:
    return {name: tensor[index] for name, tensor in cohort.stack.stacked_tensors().items()}


def same(run: Any, tensors: dict[str, torch.Tensor], own: str = "") -> None:
    expected = {name: one for name, one in get_peft_model_state_dict(run.model).items() if name.endswith(own)}
    assert expected.keys() == tensors.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("method", "positions", "reuse"),
    [
        ("loreft", "l1", "on"),
        ("direft", "l1+generated", "on"),
        ("loreft", "all", "on"),
        ("direft", "f2+l2", "off"),
        ("loreft", "prompt", "off"),
        ("direft", "all", "off"),
    ],
)
def test_each_step_of_each_user_is_as_alone(tmp_path: Path, method: str, positions: str, reuse: str) -> None:
    config = {"method": method, "positions": positions}
    args = arguments(tmp_path, prefix_reuse=reuse)
    cohort = together(args, config, tokens=40)
    steps = []
    while cohort.active:
        steps.append(cohort.step().tolist())
    assert cohort.prefixes.status.startswith(reuse)
    assert [course.total for course in cohort.courses] == [6, 2, 4]
    for index, user in enumerate(USERS):
        run = alone(user, args, config)
        assert [step[index] for step in steps][: run.state.global_step] == pytest.approx(run.losses, abs=1e-9)
        assert min(entry["grad_norm"] for entry in run.state.log_history if "grad_norm" in entry) > 0.2  # clipped
        same(run, of_user(cohort, index))


def test_the_best_epoch_is_kept_and_a_user_who_gets_no_better_stops(tmp_path: Path) -> None:
    config = {"method": "loreft", "positions": "l1+generated", "share_weights": False}
    best = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True, "num_train_epochs": 4}
    best |= {"metric_for_best_model": "eval_loss", "learning_rate": 0.1, "warmup_steps": 0}
    cohort = together(arguments(tmp_path, **best), config, patience=2)
    cohort.run()
    assert any(course.done < course.total for course in cohort.courses)
    for index, user in enumerate(USERS):
        run = alone(user, arguments(tmp_path / user.name, **best), config, patience=2)
        course = cohort.courses[index]
        assert (course.done, course.best_step) == (run.state.global_step, run.state.best_global_step)
        assert course.best_loss == pytest.approx(run.state.best_metric, abs=1e-9)
        assert course.loss_sum / course.done == pytest.approx(sum(run.losses) / len(run.losses), abs=1e-9)
        same(run, of_user(cohort, index))


def test_a_step_of_others_leaves_a_user_alone(tmp_path: Path) -> None:
    cohort = together(arguments(tmp_path), {"positions": "l1"})
    for _ in range(2):
        cohort.step()
    before = cohort.stack.stacked_tensors()
    assert cohort.active == [0, 2]
    cohort.step()
    after = cohort.stack.stacked_tensors()
    assert all(torch.equal(after[name][1], before[name][1]) for name in before)
    assert not all(torch.equal(after[name][0], before[name][0]) for name in before)


def test_a_cohort_goes_on_from_its_state_to_the_bit(tmp_path: Path) -> None:
    config = {"positions": "l1", "method": "loreft"}
    args = arguments(tmp_path, eval_strategy="epoch", prefix_reuse="off")
    whole = together(args, config)
    broken = together(args, config)
    for _ in range(3):
        broken.step()
    torch.save(broken.state(), tmp_path / "state.pt")
    resumed = together(args, config)
    resumed.load_state(torch.load(tmp_path / "state.pt"))
    whole.run()
    resumed.run()
    expected, found = whole.stack.stacked_tensors(), resumed.stack.stacked_tensors()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_model_gets_its_own_adapter_back(tmp_path: Path) -> None:
    made = model(positions="l1")
    before = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(made).items()}
    cohort = Cohort(made, USERS, arguments(tmp_path), 0, PrefixSwitch("off", None, []))
    cohort.step()
    cohort.remove()
    after = get_peft_model_state_dict(made)
    assert all(torch.equal(after[name], before[name]) for name in before)
