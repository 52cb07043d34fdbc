"""Row order is a function of seed and epoch."""

import datasets
import torch

from reftune.training.sampling import LengthGroupedByEpoch, row_lengths
from tests.training.toy_rows import rows


def test_every_row_comes_once_in_an_order_of_its_epoch() -> None:
    sampler = LengthGroupedByEpoch([3, 9, 4, 8, 5, 7, 6, 2], 2, seed=3)
    orders = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
        assert sorted(orders[-1]) == list(range(8)) and len(sampler) == 8
    assert len({tuple(order) for order in orders}) == 3
    torch.manual_seed(77)
    sampler.set_epoch(1)
    assert list(sampler) == orders[1], "the global generator has no part in it"
    assert list(LengthGroupedByEpoch(sampler.lengths, 2, seed=4)) != orders[0]


def test_batches_pad_less_than_at_random() -> None:
    lengths = torch.randint(2, 100, (400,)).tolist()

    def padding(order: list[int]) -> int:
        batches = [[lengths[i] for i in order[start : start + 4]] for start in range(0, 400, 4)]
        return sum(max(found) * len(found) - sum(found) for found in batches)

    grouped = padding(list(LengthGroupedByEpoch(lengths, 4, seed=0)))
    assert grouped < 0.4 * padding(torch.randperm(400).tolist())


def test_lengths_come_from_a_column_or_from_the_tokens() -> None:
    made = rows(6)
    expected = [len(row["input_ids"]) for row in made]
    assert row_lengths(made, "length") == expected
    assert row_lengths(datasets.Dataset.from_list(made), "length") == expected
    assert row_lengths(datasets.Dataset.from_dict({"length": [4, 2]}), "length") == [4, 2]
    assert row_lengths([{"text": "a"}], "length") is None
