"""What users share is learned as plain autograd learns it, and then each user's bias as if alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model_state_dict

from reftune.errors import ReftuneError
from reftune.training.prefix.switch import PrefixSwitch
from reftune.training.sampling import LengthGroupedByEpoch
from reftune.users.cohort import Cohort, SharedPart
from tests.tiny_models import TINY
from tests.users.test_cohort import USERS, alone, arguments, model, of_user, same

ROWS = [(number, row) for number, user in enumerate(USERS) for row in user.train]
EDIT = "base_model.model.model.layers.{}.intervention.reft_edits.{}"
LAYERS = (0, 2)


def shared_part(args: Any, bias_lr: float = 0.3, positions: str = "l1", **options: Any) -> SharedPart:
    prefixes = PrefixSwitch(args.prefix_reuse, None, [[row for user in USERS for row in user.train]])
    return SharedPart(model(positions=positions, **options), USERS, args, 0, prefixes, 40, bias_lr=bias_lr)


def orthonormal(rotation: torch.Tensor) -> torch.Tensor:
    return torch.linalg.solve_triangular(torch.linalg.cholesky(rotation @ rotation.mT), rotation, upper=False)


class Plain:
    """LoReFT of one rotation and weight a layer and a bias a user, on the last prompt token: hooks, autograd, AdamW."""

    def __init__(self, begin: dict[str, torch.Tensor], args: Any, bias_lr: float) -> None:
        self.base, self.args = TINY["llama"]().double().requires_grad_(False), args
        self.edits = [
            {own: begin[EDIT.format(layer, own)].clone() for own in ("rotation", "weight")} for layer in LAYERS
        ]
        self.biases = [[begin[EDIT.format(layer, "bias")].clone() for layer in LAYERS] for _ in USERS]
        self.here: tuple[int, int] = (0, 0)
        for number, layer in enumerate(LAYERS):
            self.base.model.layers[layer].register_forward_hook(
                lambda block, inputs, output, number=number: self.edited(output, number)
            )
        shared = [tensor.requires_grad_() for edit in self.edits for tensor in edit.values()]
        every = {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
        self.optimizers = [torch.optim.AdamW(shared, lr=args.learning_rate, weight_decay=args.weight_decay, **every)]
        for own in self.biases:
            parameters = [bias.requires_grad_() for bias in own]
            self.optimizers.append(torch.optim.AdamW(parameters, lr=bias_lr, weight_decay=0.0, **every))
        self.peaks = [group["lr"] for optimizer in self.optimizers for group in optimizer.param_groups]

    def edited(self, output: Any, number: int) -> Any:
        user, position = self.here
        h, edit = output[:, position], self.edits[number]
        R = orthonormal(edit["rotation"])
        change = (h @ edit["weight"].T + self.biases[user][number] - h @ R.T) @ R
        return torch.cat([output[:, :position], (h + change)[:, None], output[:, position + 1 :]], 1)

    def step(self, rows: list[tuple[int, Any]], share: float) -> float:
        losses = []
        for user, row in rows:
            self.here = user, row["prompt_length"] - 1
            logits = self.base(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
            labels = torch.tensor(row["labels"][1:])
            losses.append(torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="none"))
        learnt = sum(label != -100 for _, row in rows for label in row["labels"][1:])
        loss = torch.cat(losses).sum() / learnt
        loss.backward()
        present = {0, *(user + 1 for user, _ in rows)}
        for index, (optimizer, peak) in enumerate(zip(self.optimizers, self.peaks, strict=True)):
            if index in present:
                parameters = optimizer.param_groups[0]["params"]
                torch.nn.utils.clip_grad_norm_(parameters, self.args.max_grad_norm)
                optimizer.param_groups[0]["lr"] = peak * share
                optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            for edit in self.edits:
                edit["rotation"].copy_(orthonormal(edit["rotation"]))
        return loss.item()


@pytest.mark.parametrize("reuse", ["on", "off"])
def test_each_step_is_that_of_plain_autograd(tmp_path: Path, reuse: str) -> None:
    args = arguments(tmp_path, prefix_reuse=reuse)
    shared = shared_part(args)
    plain = Plain(get_peft_model_state_dict(model(positions="l1")), args, 0.3)
    order, total = LengthGroupedByEpoch([len(row["input_ids"]) for _, row in ROWS], 2, args.seed), 10
    batches = []
    for epoch in range(2):
        order.set_epoch(epoch)
        indices = list(order)
        batches += [[ROWS[i] for i in indices[start : start + 2]] for start in range(0, len(ROWS), 2)]
    for done, batch in enumerate(batches):
        expected = plain.step(batch, done / 2 if done < 2 else (total - done) / (total - 2))
        assert shared.step().item() == pytest.approx(expected, abs=1e-9)
    assert shared.active == [] and shared.prefixes.status.startswith(reuse)
    biases = shared.stack.stacked_tensors()
    shared.remove(learnt=True)
    found = get_peft_model_state_dict(shared.model)
    for number, layer in enumerate(LAYERS):
        own = torch.stack([user[number].detach() for user in plain.biases])
        expected = {**plain.edits[number], "bias": own.mean(0)}
        torch.testing.assert_close(biases[EDIT.format(layer, "bias")], own, rtol=0, atol=1e-9)
        for name, tensor in expected.items():
            torch.testing.assert_close(found[EDIT.format(layer, name)], tensor.detach(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("method", ["loreft", "direft", "noreft", "consreft", "lobireft"])
def test_biases_are_then_trained_as_alone(tmp_path: Path, method: str) -> None:
    config, args = {"method": method, "positions": "l1+generated", "biases_alone": True}, arguments(tmp_path)
    prefixes = PrefixSwitch("auto", None, [[row for user in USERS for row in user.train]])
    cohort = Cohort(model(**config), USERS, args, 0, prefixes, tokens=40, shared=True)
    cohort.run()
    for index in (0, 1):
        same(alone(USERS[index], args, config), of_user(cohort, index), own=".bias")


def test_the_best_epoch_is_kept_for_all(tmp_path: Path) -> None:
    best = {"eval_strategy": "epoch", "learning_rate": 0.3, "warmup_steps": 0, "num_train_epochs": 4}
    shared = shared_part(arguments(tmp_path, **best))
    losses = {}

    def look() -> None:
        if shared.course.ends_epoch:
            of_users = shared.held_out_losses(range(3))
            losses[shared.course.done] = sum(of_users) / 3

    shared.run(look)
    assert shared.course.best_step == min(losses, key=losses.__getitem__) < 20
    assert shared.course.best_loss == pytest.approx(min(losses.values()), abs=1e-12)
    now = shared.held_out_losses(range(3))
    assert sum(now) / 3 == pytest.approx(min(losses.values()), abs=1e-12)


def test_it_goes_on_from_its_state_to_the_bit(tmp_path: Path) -> None:
    args = arguments(tmp_path, eval_strategy="epoch", prefix_reuse="off")
    whole, broken, resumed = (shared_part(args) for _ in range(3))
    for _ in range(6):
        broken.step()
    torch.save(broken.state(), tmp_path / "state.pt")
    resumed.load_state(torch.load(tmp_path / "state.pt", weights_only=True))
    for part in (whole, resumed):
        part.run()
    expected, found = whole.state(), resumed.state()
    assert torch.equal(found["rows"], expected["rows"])
    assert torch.equal(found["common"]["rows"], expected["common"]["rows"])
    assert found["course"] == expected["course"]


@pytest.mark.parametrize("config", [{"method": "gated"}, {"act_fn": "relu"}])
def test_an_edit_that_is_not_linear_is_refused_and_the_model_is_as_before(tmp_path: Path, config: Any) -> None:
    with pytest.raises(ReftuneError, match="take a linear edit"):
        shared_part(arguments(tmp_path), **config)
