"""Rows in groups of similar length: the split that costs least, and batches that must stay whole."""

from __future__ import annotations

from itertools import product

import torch
from hypothesis import given
from hypothesis import strategies as st

from reftune.training.prefix.row_groups import length_groups, plain_groups


def cost(groups: list[list[int]], lengths: list[int], forward_cost: int) -> int:
    return sum(len(group) * max(lengths[row] for row in group) + forward_cost for group in groups)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(1, 60))
def test_no_other_split_costs_less(lengths: list[int], forward_cost: int):
    found = length_groups(lengths, forward_cost)
    assert sorted(row for group in found for row in group) == list(range(len(lengths)))
    rows = range(len(lengths))
    every = (
        [group for name in rows if (group := [row for row in rows if names[row] == name])]
        for names in product(rows, repeat=len(lengths))
    )
    assert cost(found, lengths, forward_cost) == min(cost(split, lengths, forward_cost) for split in every)


def test_a_batch_stays_whole_where_one_forward_is_wanted():
    assert length_groups([3, 900, 4], None) == [[0, 1, 2]]


def batch(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    ids = torch.arange(1, 13).reshape(2, 6)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]])
    labels = torch.where(torch.tensor([[0, 0, 1, 0, 0, 0], [0, 0, 0, 1, 1, 0]]) > 0, ids, -100)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": labels,
        "prompt_lengths": torch.tensor([2, 3]),
        **changes,
    }


def test_rows_are_cut_after_the_last_token_that_predicts():
    (one, short), (other, long) = plain_groups(batch(), 1)
    assert (one, other) == ([0], [1])
    assert short["input_ids"].tolist() == [[1, 2]] and short["shift_labels"].tolist() == [[-100, 3]]
    assert long["input_ids"].tolist() == [[7, 8, 9, 10]] and long["shift_labels"].tolist() == [[-100, -100, 10, 11]]
    assert short["prompt_lengths"].tolist() == [2] and long["attention_mask"].all()


def test_batches_that_are_not_rows_padded_on_the_right_stay_whole():
    left = batch(attention_mask=torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]))
    packed = batch(position_ids=torch.zeros(2, 6, dtype=torch.long))
    for inputs in (left, packed):
        ((members, found),) = plain_groups(inputs, 1)
        assert found is inputs and members == [0, 1]
