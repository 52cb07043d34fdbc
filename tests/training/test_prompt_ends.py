"""Batches of any collator say where their prompts end, in the form the model takes."""

import copy
from typing import Any

import torch

from reftune.data.collating import CompletionCollator
from reftune.training.prompt_ends import takes_prompt_lengths, with_prompt_ends
from reftune.training.supervised_logits import supervised_forward
from tests.tiny_models import TINY
from tests.training.toy_rows import batch, reft_model, rows, trainer


def test_only_a_model_with_edits_takes_them() -> None:
    assert takes_prompt_lengths(reft_model())
    assert not takes_prompt_lengths(TINY["llama"]())


def test_ends_are_read_from_labels_whatever_the_padding() -> None:
    model = reft_model()
    for side in ("left", "right"):
        collated = CompletionCollator(0, side)(rows(5))  # type: ignore[arg-type]
        expected = collated.pop("prompt_lengths")
        assert torch.equal(with_prompt_ends(model, collated)["prompt_lengths"], expected)


def test_ends_that_are_sent_are_kept() -> None:
    sent = torch.tensor([1, 1, 1])
    assert with_prompt_ends(reft_model(), {**batch(), "prompt_lengths": sent})["prompt_lengths"] is sent


def test_packed_documents_have_an_end_each_and_the_logits_of_padded_rows() -> None:
    model, made = reft_model(), rows(3)
    model.config.use_cache = False  # as the trainer sets it; with a cache transformers does not keep documents apart
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3)  # not the identity any more
    packed = {
        "input_ids": torch.tensor([sum((row["input_ids"] for row in made), [])]),
        "labels": torch.tensor([sum((row["labels"] for row in made), [])]),
        "position_ids": torch.tensor([sum((list(range(len(row["input_ids"]))) for row in made), [])]),
    }
    ended = with_prompt_ends(model, packed)
    assert ended["prompt_lengths"].tolist() == [row["labels"].count(-100) for row in made]
    found = supervised_forward(model, ended)
    padded = supervised_forward(model, CompletionCollator(0)(made))
    assert torch.equal(found.targets, padded.targets)
    torch.testing.assert_close(found.logits, padded.logits, rtol=0, atol=1e-5)


def test_label_smoothing_with_a_foreign_collator_edits_the_same_tokens(tmp_path: Any) -> None:
    losses = []
    for forget in (False, True):
        run = trainer(tmp_path, label_smoothing_factor=0.1)
        collate = run.data_collator

        def without(made: Any, collate: Any = collate) -> Any:
            return {name: value for name, value in collate(made).items() if name != "prompt_lengths"}

        run.data_collator = without if forget else collate
        run.train()
        losses.append([entry["loss"] for entry in run.state.log_history if "loss" in entry])
    assert losses[0] == losses[1]


def test_the_caller_s_batch_is_left_as_it_was() -> None:
    inputs = batch()
    before = copy.deepcopy(inputs)
    with_prompt_ends(reft_model(), inputs)
    assert inputs.keys() == before.keys()
