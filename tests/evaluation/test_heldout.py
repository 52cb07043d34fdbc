from __future__ import annotations

import pytest
import torch

from reftune.data.formats import Example, Message
from reftune.data.tokenising import encode_example
from reftune.evaluation.heldout import evaluate_rows, exact_match, held_out_losses
from reftune.inference.generation import GenerationSettings, generate_answers
from reftune.inference.loading import EditedModel
from tests.inference.edited import tiny_edited

ROWS = [
    Example((Message("user", prompt),), completion)
    for prompt, completion in [("hi", "ho"), ("a longer prompt", "with a longer answer"), ("x", "y")]
]


@pytest.fixture(scope="module")
def edited(tmp_path_factory: pytest.TempPathFactory) -> EditedModel:
    return tiny_edited(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("base", [False, True])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_loss_is_that_of_a_supervised_token(edited: EditedModel, base: bool, batch_size: int) -> None:
    total, tokens = 0.0, 0
    for row in ROWS:
        encoded = encode_example(row, edited.tokenizer)
        ids, labels = torch.tensor([encoded["input_ids"]]), torch.tensor([encoded["labels"]])
        with torch.no_grad():
            if base:
                with edited.model.disable_adapter():
                    loss = edited.model(input_ids=ids, labels=labels).loss
            else:
                loss = edited.model(input_ids=ids, labels=labels).loss
        total, tokens = total + float(loss) * int((labels != -100).sum()), tokens + int((labels != -100).sum())
    found = held_out_losses(edited, ROWS, batch_size, base=base)
    assert sum(found.tokens) == tokens
    assert found.per_token == pytest.approx(total / tokens, rel=1e-5)


def test_exact_match_counts_the_rows_whose_greedy_answer_is_the_completion(edited: EditedModel) -> None:
    settings = GenerationSettings(max_new_tokens=6, batch_size=2)
    answer = next(generate_answers(edited, [ROWS[0]], settings)).text
    rows = [Example(ROWS[0].messages, f" {answer} "), *ROWS[1:]]
    scores = evaluate_rows(edited, rows, settings)
    assert scores.exact_match == pytest.approx(1 / 3)
    assert scores.answers is not None and scores.answers[0] == answer
    assert evaluate_rows(edited, rows, settings, generate=False).exact_match is None


def test_whitespace_does_not_decide_a_match() -> None:
    assert exact_match(" two\n words ", "two words")
    assert not exact_match("Two words", "two words")
