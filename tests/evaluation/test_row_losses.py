from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model

from reftune import models
from reftune.adapter.config import ReftConfig
from reftune.data.formats import read_examples
from reftune.data.tokenising import encode_dataset
from reftune.evaluation.row_losses import row_losses
from tests.cli.tiny_folder import save_tiny_model

ROWS = [{"prompt": f"say {n}" + " and on" * n, "completion": "ye be " + "so " * (5 - n)} for n in range(6)]


@pytest.fixture
def base_and_tokenizer(tmp_path: Path) -> tuple[Any, Any]:
    save_tiny_model(tmp_path / "tiny")
    return models.load(str(tmp_path / "tiny"), device="cpu")


def test_each_row_has_the_loss_that_it_has_alone(base_and_tokenizer: tuple[Any, Any]) -> None:
    base, tokenizer = base_and_tokenizer
    config = ReftConfig(layers_to_transform=1, positions="l1", init="paper", task_type="CAUSAL_LM")
    model = get_peft_model(base, config).eval()
    encoded = encode_dataset(read_examples(ROWS), tokenizer)
    found = row_losses(model, encoded, int(tokenizer.pad_token_id or 0), 4)
    for row, total, tokens in zip(encoded, found.sums, found.tokens, strict=True):
        with torch.no_grad():
            own = model(input_ids=torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]])).loss
        assert tokens == sum(label != -100 for label in row["labels"])
        assert total == pytest.approx(float(own) * tokens, rel=1e-5)
    assert found.per_token == pytest.approx(sum(found.sums) / sum(found.tokens), rel=1e-12)


def test_virtual_tokens_before_a_row_are_not_part_of_it(base_and_tokenizer: tuple[Any, Any]) -> None:
    base, tokenizer = base_and_tokenizer
    rows = encode_dataset(read_examples(ROWS[:1]), tokenizer)
    model = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).train()
    found = row_losses(model, rows, int(tokenizer.pad_token_id or 0), 2)
    assert model.training, "the mode was not put back"
    model.eval()
    with torch.no_grad():
        own = model(input_ids=torch.tensor([rows[0]["input_ids"]]), labels=torch.tensor([rows[0]["labels"]])).loss
    assert found.per_token == pytest.approx(float(own), abs=1e-5)
