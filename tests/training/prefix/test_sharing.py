"""A store that several trainings share: full hits where the tensors are the same, none where they are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn

import reftune
from reftune.data.collating import CompletionCollator
from reftune.training import PrefixStore, ReftTrainer, ReftTrainingArguments
from reftune.training.loss import completion_loss
from reftune.training.prefix.base_identity import base_identity
from reftune.training.prefix.switch import PrefixSwitch
from tests.tiny_models import TINY


def examples(count: int = 10) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)

    def draw(low: int, high: int, n: int = 1) -> list[int]:
        return torch.randint(low, high, (n,), generator=generator).tolist()

    rows = []
    for _ in range(count):
        prompt, completion = [7, 8, 9, *draw(3, 90, draw(3, 9)[0])], draw(3, 90, draw(1, 5)[0])
        labels = [-100] * len(prompt) + completion
        rows.append({"input_ids": prompt + completion, "labels": labels, "prompt_length": len(prompt)})
    return rows


def tuned(seed: int = 0, **changes: Any) -> Any:
    settings = {"r": 2, "init": "paper", "positions": "l1", "layers_to_transform": [1], "task_type": "CAUSAL_LM"}
    base = TINY["llama"]()
    torch.manual_seed(seed)
    return get_peft_model(base, reftune.ReftConfig(**{**settings, **changes}))


def train(folder: Path, store: PrefixStore | None, seed: int = 1, lr: float = 1e-2, **changes: Any) -> ReftTrainer:
    trainer = ReftTrainer(
        model=tuned(seed, **changes),
        args=ReftTrainingArguments(
            output_dir=str(folder), per_device_train_batch_size=4, num_train_epochs=2, learning_rate=lr, seed=seed,
            report_to="none", use_cpu=True, disable_tqdm=True, prefix_reuse="on", eval_strategy="epoch",
            save_strategy="no",
        ),
        train_dataset=Dataset.from_list(examples()),
        eval_dataset=Dataset.from_list(examples(12)[10:]),
        data_collator=CompletionCollator(0),
        prefix_store=store,
    )  # fmt: skip
    trainer.train()
    return trainer


def weights(trainer: ReftTrainer) -> list[torch.Tensor]:
    return [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad]


def counts(trainer: ReftTrainer) -> tuple[int, int]:
    summary = trainer.report()["prefix_store"]
    return summary["hits"], summary["misses"]


def gradients(model: nn.Module, rows: list[dict[str, Any]], store: PrefixStore | None) -> list[torch.Tensor]:
    model.zero_grad()
    inputs: dict[str, Any] = dict(CompletionCollator(0)(rows))
    found = PrefixSwitch("off" if store is None else "on", None, [rows], store=store).forward(model, inputs)
    completion_loss(found.logits, found.targets).backward()
    return [p.grad.clone() for p in model.parameters() if p.requires_grad and p.grad is not None]


def test_a_filled_store_gives_bit_equal_weights(tmp_path: Path):
    alone = train(tmp_path / "alone", None)
    store, asked = PrefixStore(10**8, 0), []
    for name in ("first", "second"):
        trainer = train(tmp_path / name, store)
        asked.append(counts(trainer))
        for one, other in zip(weights(trainer), weights(alone), strict=True):
            assert torch.equal(one, other)
        assert trainer.report()["eval_loss"] == alone.report()["eval_loss"]
    assert counts(alone) == asked[0] and asked[0][1] > 0
    assert asked[1] == (sum(asked[0]), 0), "each training reports what it asked for itself"
    trainer.prefixes.close()
    assert len(store) > 0, "the store stays open"
    other = train(tmp_path / "other", store, seed=5, lr=1e-3)
    assert counts(other)[1] == 0, "another seed, order and learning rate find everything"


@pytest.mark.parametrize(
    "changes",
    [{"r": 3}, {"seed": 5}, {"init": "identity"}, {"method": "direft"}, {"dropout": 0.2},
     {"layers_to_transform": [1, 2]}],
    ids=str,
)  # fmt: skip
def test_trials_that_edit_first_at_the_same_place_compute_nothing_anew(changes: dict[str, Any]):
    rows, store = examples(), PrefixStore(10**8, 0)
    gradients(tuned(), rows, store)
    entries, misses, hits = len(store), store.misses, store.hits
    gradients(tuned(**changes), rows, store)
    assert (len(store), store.misses) == (entries, misses) and store.hits > hits


@pytest.mark.parametrize(
    "changes",
    [{"layers_to_transform": [0]}, {"layers_to_transform": [2]}, {"positions": "l3"}, {"positions": "f1+l1"},
     {"component": "mlp_output"}, {"positions": "prompt"}],
    ids=str,
)  # fmt: skip
def test_a_trial_at_another_place_gets_right_gradients_from_a_filled_store(changes: dict[str, Any]):
    rows, store = examples(), PrefixStore(10**8, 0)
    gradients(tuned().double(), rows, store)
    model = tuned(**changes).double()
    plain = gradients(model, rows, None)
    for _ in ("computed", "from the store"):
        found = gradients(model, rows, store)
        assert len(found) == len(plain) > 0
        for one, other in zip(found, plain, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_rows_of_the_same_tokens_and_other_prompt_ends_are_told_apart():
    row = {"input_ids": [7, 8, 9, 20, 21, 22, 23, 24], "labels": [-100] * 5 + [22, 23, 24], "prompt_length": 5}
    other = {**row, "prompt_length": 4}
    model, store = tuned().double(), PrefixStore(10**8, 0)
    for rows in ([row], [other], [row, other]):
        plain = gradients(model, rows, None)
        for one, same in zip(gradients(model, rows, store), plain, strict=True):
            torch.testing.assert_close(one, same, rtol=1e-6, atol=1e-7)


def changed_by_one_element(model: Any) -> None:
    weight = model.get_base_model().model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        weight[3, 5] += 1e-3


def with_another_attention(model: Any) -> None:
    model.get_base_model().set_attn_implementation("eager")


def with_more_rotation(model: Any) -> None:
    model.get_base_model().config.rope_parameters["rope_theta"] = 5000.0


def halved(model: Any) -> None:
    model.to(torch.bfloat16)


@pytest.mark.parametrize("change", [changed_by_one_element, with_another_attention, with_more_rotation, halved])
def test_two_models_never_share(change: Any):
    rows, store = examples(), PrefixStore(10**8, 0)
    gradients(tuned(), rows, store)
    other = tuned()
    assert base_identity(other.get_base_model()) == base_identity(tuned(seed=3, r=5).get_base_model())
    change(other)
    before = store.hits
    PrefixSwitch("auto", None, [rows], store=store)._try(other, dict(CompletionCollator(0)(rows)))
    fresh = PrefixStore(10**8, 0)
    PrefixSwitch("auto", None, [rows], store=fresh)._try(other, dict(CompletionCollator(0)(rows)))
    assert store.hits - before == fresh.hits, "every hit is of an entry that it stored itself"


def test_autocast_does_not_share_with_full_precision():
    rows, store = examples(), PrefixStore(10**8, 0)
    gradients(tuned(), rows, store)
    entries = len(store)
    with torch.autocast("cpu", torch.bfloat16):
        gradients(tuned(), rows, store)
    assert len(store) == 2 * entries


def test_a_frozen_lora_is_part_of_the_base_and_counts_only_while_it_is_on():
    lora = get_peft_model(TINY["llama"](), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    base = lora.get_base_model()
    on = base_identity(base)
    with lora.disable_adapter():
        off = base_identity(base)
    assert on != off and base_identity(base) == on != base_identity(TINY["llama"]())


@pytest.mark.parametrize("on_disk", [False, True])
def test_what_no_trial_asked_for_makes_room(on_disk: bool):
    rows, probe = examples(), PrefixStore(10**8, 0)
    gradients(tuned(), rows, probe)
    budget = probe.memory_used * 5 // 4
    store = PrefixStore(0, budget) if on_disk else PrefixStore(budget, 0)
    gradients(tuned(), rows, store)
    assert store.evicted == 0
    for _ in range(3):
        store.next_pass()
        gradients(tuned(layers_to_transform=[2]), rows, store)
    assert store.evicted > 0, "entries of layer 1, which the last passes never asked for"
    misses = store.misses
    gradients(tuned(layers_to_transform=[2]), rows, store)
    assert store.misses == misses
    assert store.memory_used <= store.memory_budget and store.disk_used <= store.disk_budget
    files = list(store._folder.iterdir()) if store._folder else []
    assert sum(path.stat().st_size for path in files) == store.disk_used
    store.close()
