from __future__ import annotations

import pytest

from reftune.data.glue import GLUE, split_held_out


@pytest.mark.parametrize(
    ("task", "rows", "validation"),
    [
        ("mnli", 9815, 1000), ("sst2", 872, 436), ("mrpc", 408, 204), ("cola", 1043, 521), ("qnli", 5463, 1000),
        ("qqp", 40430, 1000), ("rte", 277, 138), ("stsb", 1500, 750),
    ],
)  # fmt: skip
def test_each_validation_set_is_cut_as_in_the_paper(task: str, rows: int, validation: int) -> None:
    assert task in GLUE
    chosen, test = split_held_out(range(rows), seed=42)
    assert len(chosen) == validation
    assert sorted([*chosen, *test]) == list(range(rows)) and chosen == sorted(chosen) and test == sorted(test)


def test_the_seed_decides_which_rows_choose_the_checkpoint() -> None:
    first, again, other = (split_held_out(range(100), seed)[0] for seed in (1, 1, 2))
    assert first == again != other
