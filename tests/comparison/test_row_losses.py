from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model

from reftune import models
from reftune.comparison.row_losses import row_losses
from reftune.config import ReftConfig
from reftune.data.formats import read_examples
from reftune.data.tokenising import Encoding, encode_dataset
from reftune.evaluation.heldout import held_out_loss
from reftune.inference.loading import EditedModel


def test_the_rows_add_up_to_the_held_out_loss(place: Path) -> None:
    base, tokenizer = models.load(str(place / "tiny"), device="cpu")
    rows = read_examples(place / "rows.csv")
    config = ReftConfig(layers_to_transform=1, positions="l1", init="paper", task_type="CAUSAL_LM")
    model = get_peft_model(base, config).eval()
    found = row_losses(model, encode_dataset(rows, tokenizer), int(tokenizer.pad_token_id or 0), 5)
    loss, tokens = held_out_loss(EditedModel(model, tokenizer, Encoding(tokenizer)), rows, 3)  # type: ignore[arg-type]
    assert sum(found.tokens) == tokens
    assert found.per_token == pytest.approx(loss, abs=1e-5)
    alone = row_losses(model, encode_dataset(rows[3:4], tokenizer), int(tokenizer.pad_token_id or 0), 1)
    assert alone.sums[0] == pytest.approx(found.sums[3], abs=1e-4)


def test_virtual_tokens_before_a_row_are_not_part_of_it(place: Path) -> None:
    base, tokenizer = models.load(str(place / "tiny"), device="cpu")
    rows = encode_dataset(read_examples(place / "rows.csv")[:1], tokenizer)
    model = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).train()
    found = row_losses(model, rows, int(tokenizer.pad_token_id or 0), 2)
    assert model.training, "the mode was not put back"
    model.eval()
    with torch.no_grad():
        own = model(input_ids=torch.tensor([rows[0]["input_ids"]]), labels=torch.tensor([rows[0]["labels"]])).loss
    assert found.per_token == pytest.approx(float(own), abs=1e-5)
