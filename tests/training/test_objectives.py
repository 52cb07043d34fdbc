"""RePS and ReFT-r1: the losses by their formulas, on models by plain hooks, and as a trainer trains with them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch import Tensor

from reftune.data.collating import CompletionCollator
from reftune.errors import ReftuneError
from reftune.training.loss import reps_loss
from reftune.training.objectives import ReftR1, activations
from reftune.training.prompt_ends import with_prompt_ends
from tests.training.toy_rows import history, lora_model, reft_model, rows, trainer, weights

VECTOR = {"method": "lobireft", "r": 1, "layers_to_transform": [1], "positions": "l1+generated", "init": "paper"}


def pairs(count: int = 6, seed: int = 0) -> datasets.Dataset:
    """Rows with a second answer to the same prompt."""
    made = []
    for row, other in zip(rows(count, seed), rows(count, seed + 100), strict=True):
        prompt = [i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label == -100]
        answer = [label for label in other["labels"] if label != -100]
        rejected = {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}
        both = {**row, **{f"rejected_{name}": value for name, value in rejected.items()}}
        made.append({**both, "prompt_length": len(prompt), "rejected_prompt_length": len(prompt)})
    return datasets.Dataset.from_list(made)


def pair_trainer(folder: Any, model: Any, objective: str = "reps", **settings: Any) -> Any:
    made = trainer(folder, model, train=pairs(), objective=objective, **settings)
    made.eval_dataset = pairs(4, seed=9)
    return made


def test_the_preference_is_that_of_the_paper_in_float64() -> None:
    torch.manual_seed(0)
    steered, nulled, base = (-30 * torch.rand(2, 5, dtype=torch.float64) for _ in range(3))
    tokens = torch.randint(1, 9, (2, 5))
    found = reps_loss(steered, nulled, base, tokens)
    for pair in range(5):
        (p, n), (pn, nn), (pb, nb), (lp, ln) = (part[:, pair].tolist() for part in (steered, nulled, base, tokens))
        chosen = max(nb - pb, 1) / lp * p - n / ln
        refused = max(pb - nb, 1) / ln * nn - pn / lp
        wanted = math.log1p(math.exp(-chosen)) + math.log1p(math.exp(-refused))
        assert found[pair].item() == pytest.approx(wanted, rel=1e-12)
    inputs = [part.requires_grad_() for part in (steered, nulled)]
    assert torch.autograd.gradcheck(lambda one, other: reps_loss(one, other, base, tokens), inputs)


def by_hooks(model: Any, row: dict[str, Any], change: Any) -> Tensor:
    """The log-probability of a row's answer with a change at block 1, from its last prompt token on; no reftune."""
    start = row["prompt_length"] - 1

    def hook(module: Any, args: Any, output: Any) -> Any:
        hidden = output if isinstance(output, Tensor) else output[0]
        edited = torch.cat([hidden[:, :start], change(hidden[:, start:])], 1)
        return edited if isinstance(output, Tensor) else (edited, *output[1:])

    handle = model.model.layers[1].register_forward_hook(hook)
    logits = model(input_ids=torch.tensor([row["input_ids"]])).logits.double().log_softmax(-1)[0]
    handle.remove()
    answer = torch.tensor(row["input_ids"][start + 1 :])
    return logits[start : start + len(answer)].gather(1, answer[:, None]).sum()


@pytest.mark.parametrize("method", ["lobireft", "loreft"])
def test_a_batch_costs_what_plain_hooks_say_and_has_their_gradient(tmp_path: Path, method: str) -> None:
    model = reft_model(**{**VECTOR, "method": method})
    (edit,) = model.base_model.engine.edits("default").values()
    with torch.no_grad():
        edit.bias.fill_(-0.7)
    run = pair_trainer(tmp_path, model, factors=[1.5])
    chosen = pairs(3)
    batch = with_prompt_ends(model, CompletionCollator(0)(list(chosen)))
    model.train()
    loss = run.compute_loss(model, batch)
    loss.backward()
    found = edit.bias.grad.clone()

    plain = reft_model(**VECTOR).unload()  # the same seeded base
    R, b = edit.rotation.detach().clone(), edit.bias.detach().clone().requires_grad_()
    W = edit.weight.detach().clone() if method == "loreft" else R

    def added(h: Tensor, factor: float) -> Tensor:
        return h + factor * ((h @ (W - R).T + b) @ R)

    def nulled(h: Tensor) -> Tensor:
        if method == "loreft":
            return added(h, -1.5)
        v = b * R[0]
        return h - (torch.relu(h @ v) / v.square().sum())[..., None] * v

    wanted = []
    for row in chosen:
        sides = [{n: row[p + n] for n in ("input_ids", "prompt_length")} for p in ("", "rejected_")]
        lengths = [len(s["input_ids"]) - s["prompt_length"] for s in sides]
        p, n = (by_hooks(plain, side, lambda h: added(h, 1.5)) for side in sides)
        pn, nn = (by_hooks(plain, side, nulled) for side in sides)
        pb, nb = (by_hooks(plain, side, lambda h: h).item() for side in sides)
        one = max(nb - pb, 1) / lengths[0] * p - n / lengths[1]
        other = max(pb - nb, 1) / lengths[1] * nn - pn / lengths[0]
        wanted.append(-torch.nn.functional.logsigmoid(one) - torch.nn.functional.logsigmoid(other))
    expected = torch.stack(wanted).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    expected.backward()
    assert torch.allclose(found, b.grad, rtol=1e-4, atol=1e-6) and found.abs().max() > 1e-4
    assert run.model.base_model.engine.placements("default")[0].scale == 1.0 and not getattr(edit, "nulls", False)


def test_an_evaluated_pair_costs_what_it_costs_in_training(tmp_path: Path) -> None:
    run = pair_trainer(tmp_path, reft_model(**VECTOR), per_device_eval_batch_size=4)
    batch = CompletionCollator(0)(list(pairs(4, seed=9)))
    run.model.train()
    assert run.evaluate()["eval_loss"] == pytest.approx(run.compute_loss(run.model, batch).item(), rel=1e-5)


@pytest.mark.parametrize("method", ["lobireft", "loreft"])
def test_prefix_reuse_trains_the_same_edit(tmp_path: Path, method: str) -> None:
    found = []
    for mode in ("on", "off"):
        settings = {**VECTOR, "method": method}
        run = pair_trainer(tmp_path / mode, reft_model(**settings), prefix_reuse=mode, learning_rate=0.05)
        run.train()
        found.append(weights(run.model))
    assert run.report()["prefix_reuse"].startswith("off")
    for name, weight in found[0].items():
        assert torch.allclose(weight, found[1][name], atol=1e-5), name


def test_accumulated_pairs_are_one_large_batch(tmp_path: Path) -> None:
    found = []
    for rows_, steps in ((6, 1), (2, 3)):
        run = pair_trainer(
            tmp_path / str(steps), reft_model(**VECTOR), per_device_train_batch_size=rows_,
            gradient_accumulation_steps=steps, learning_rate=0.05,
        )  # fmt: skip
        run.train()
        found.append(weights(run.model))
    for name, weight in found[0].items():
        assert torch.allclose(weight, found[1][name], atol=1e-5), name


@pytest.mark.parametrize("objective", ["reps", "reft-r1"])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, objective: str, determinism: None) -> None:
    settings = {
        "full_determinism": True, "save_strategy": "steps", "save_steps": 4, "save_total_limit": None,
        "num_train_epochs": 3, "learning_rate": 0.02, "eval_strategy": "epoch",
        **({"factors": [0.5, 1.0, 2.0]} if objective == "reps" else {}),
    }  # fmt: skip
    whole = pair_trainer(tmp_path, reft_model(dropout=0.1, **VECTOR), objective, **settings)
    whole.train()
    torch.manual_seed(12345)
    resumed = pair_trainer(tmp_path / "again", reft_model(dropout=0.1, **VECTOR), objective, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert history(resumed) == history(whole)
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], weight), name


def test_a_direction_is_as_strong_as_its_8_largest_activations() -> None:
    torch.manual_seed(0)
    hidden, direction = torch.randn(3, 12, 5), torch.randn(5)
    mask = torch.ones(3, 12, dtype=torch.bool)
    mask[1, 4:] = False
    strength, rest = activations(hidden, direction, mask)
    for row in range(3):
        own = sorted((max(float(h @ direction), 0.0) for h in hidden[row][mask[row]]), reverse=True)
        assert strength[row].item() == pytest.approx(sum(own[:8]) / min(8, len(own)), rel=1e-5)
        assert rest[row].item() == pytest.approx(sum(own[8:]) / len(own), rel=1e-5, abs=1e-6)


def test_reft_r1_adds_each_rows_own_strength_and_learns_both_answers(tmp_path: Path) -> None:
    model = reft_model(**VECTOR)
    (edit,) = model.base_model.engine.edits("default").values()
    r1 = ReftR1(model)
    chosen = pairs(3)
    model.train()
    batch = with_prompt_ends(model, CompletionCollator(0)(list(chosen)))
    loss, _ = r1(model, batch, None, 0.5)
    loss.backward()
    assert edit.bias.grad is None and edit.rotation.grad.abs().max() > 1e-5
    r1.keep_strength(first=True)

    w, plain = edit.rotation.detach()[0], reft_model(**VECTOR).unload()
    total, tokens, strengths, rests = 0.0, 0, [], []
    for prefix in ("", "rejected_"):
        for row in chosen:
            own = {n: row[prefix + n] for n in ("input_ids", "prompt_length")}

            def change(h: Tensor) -> Tensor:
                active = torch.relu(h[0] @ w).sort(descending=True).values
                strengths.append(active[:8].mean().item())
                rests.append(active[8:].sum().item() / len(active))
                return h + active[:8].mean() * w

            total -= by_hooks(plain, own, change).item()
            tokens += len(own["input_ids"]) - own["prompt_length"]
    assert loss.item() == pytest.approx(total / tokens + 0.005 * 0.5 * sum(rests) / 6, rel=1e-5)
    assert edit.bias.item() == pytest.approx(sum(strengths[:3]) / 3, rel=1e-5)


@pytest.mark.parametrize(
    ("model", "settings", "said"),
    [
        (lambda: reft_model(**VECTOR), {"gradient_checkpointing": True}, "checkpointing"),
        (lambda: reft_model(**VECTOR), {"factors": [0.0]}, "above 0"),
        (lambda: reft_model(**VECTOR), {"objective": "dpo"}, "must be one of"),
        (lambda: reft_model(**{**VECTOR, "r": 2}), {"objective": "reft-r1"}, "one vector"),
        (lambda: reft_model(**VECTOR), {"objective": "reft-r1", "prefix_reuse": "on"}, "prefix_reuse='on'"),
        (lambda: reft_model(**VECTOR), {"supervised_logits_only": False}, "supervised"),
        (lora_model, {}, "ReFT edits"),
    ],
)
def test_what_cannot_be_trained_so_is_refused(tmp_path: Path, model: Any, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ReftuneError, match=said):
        pair_trainer(tmp_path, model(), **settings).train()


def test_rows_that_are_no_pairs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ReftuneError, match="pairs of answers"):
        trainer(tmp_path, reft_model(**VECTOR), objective="reps")
