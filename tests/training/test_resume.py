"""A resumed run is the uninterrupted run, bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.toy_rows import history, lora_model, reft_model, trainer, weights

KINDS = {"lora": lora_model, "reft": reft_model}


@pytest.mark.parametrize("kind", ["lora", "reft"])
@pytest.mark.parametrize(
    "settings",
    [
        {"save_steps": 3},  # in the middle of the first epoch
        {"save_steps": 5},  # between two epochs
        {"save_steps": 7},  # in the middle of the second
        {"save_steps": 7, "logging_steps": 4},  # in the middle of a logging interval too
        {"save_steps": 7, "logging_steps": 4, "eval_strategy": "steps", "eval_steps": 2},
        {"save_steps": 7, "train_sampling_strategy": "random"},
        {"save_steps": 3, "gradient_accumulation_steps": 2, "num_train_epochs": 3},
        {"save_steps": 6, "dataloader_num_workers": 1},
    ],
    ids=str,
)
def test_a_resumed_run_repeats_the_uninterrupted_one(
    tmp_path: Path, kind: str, settings: dict[str, Any], determinism: None
) -> None:
    settings = {
        "full_determinism": True,
        "save_strategy": "steps",
        "save_total_limit": None,
        "num_train_epochs": 3,
        **settings,
    }
    whole = trainer(tmp_path, KINDS[kind](dropout=0.3), **settings)
    whole.train()
    checkpoint = tmp_path / f"checkpoint-{settings['save_steps']}"

    torch.manual_seed(12345)  # another process would not be where this one is
    resumed = trainer(tmp_path / "again", KINDS[kind](dropout=0.3), **settings)
    with torch.no_grad():
        for parameter in resumed.model.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)  # nor hold these weights
    resumed.train(resume_from_checkpoint=str(checkpoint))

    assert history(resumed) == history(whole)
    for name, weight in weights(whole.model).items():
        assert torch.equal(weights(resumed.model)[name], weight), name
    report, expected = resumed.report(), whole.report()
    assert report["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-6)
    assert report["tokens"] == expected["tokens"]
    assert len(report["epoch_seconds"]) == len(expected["epoch_seconds"])


def test_dropout_and_shuffling_matter_to_these_runs(tmp_path: Path) -> None:
    runs = []
    for seed in (1, 2):
        run = trainer(tmp_path, reft_model(dropout=0.3), seed=seed)
        run.train()
        runs.append(history(run))
    assert runs[0] != runs[1]


def test_resuming_from_a_finished_run_trains_no_further(tmp_path: Path) -> None:
    whole = trainer(tmp_path, save_strategy="epoch")
    whole.train()
    again = trainer(tmp_path)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 10
    for name, weight in weights(whole.model).items():
        assert torch.equal(weights(again.model)[name], weight)
