import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reftune.data.collating import CompletionCollator
from reftune.errors import ReftuneError

ROW = st.tuples(st.integers(1, 8), st.integers(1, 8)).map(
    lambda sizes: {
        "input_ids": list(range(10, 10 + sum(sizes))),
        "labels": [-100] * sizes[0] + list(range(10 + sizes[0], 10 + sum(sizes))),
        "prompt_length": sizes[0],
    }
)


@given(st.lists(ROW, min_size=1, max_size=5), st.sampled_from(["left", "right"]), st.sampled_from([None, 1, 8]))
def test_padding_adds_only_unattended_unlearnt_tokens(rows: list[dict], side: str, multiple: int | None) -> None:
    batch = CompletionCollator(0, side, multiple)(rows)
    length = batch["input_ids"].shape[1]
    longest = max(len(row["input_ids"]) for row in rows)
    assert length >= longest and length % (multiple or 1) == 0 and length - longest < (multiple or 1)
    assert batch["prompt_lengths"].dtype == torch.int64
    for index, row in enumerate(rows):
        attended = batch["attention_mask"][index].bool()
        assert batch["input_ids"][index][attended].tolist() == row["input_ids"]
        assert batch["labels"][index][attended].tolist() == row["labels"]
        assert (batch["labels"][index][~attended] == -100).all()
        assert (batch["input_ids"][index][~attended] == 0).all()
        edge = attended[-1] if side == "left" else attended[0]
        assert edge  # padding is on the named side only
        assert batch["prompt_lengths"][index] == row["prompt_length"]


def test_the_prompt_end_is_derived_from_labels_where_it_is_not_stated() -> None:
    rows = [{"input_ids": [1, 2, 3], "labels": [-100, -100, 3]}, {"input_ids": [1, 2], "labels": [-100, 2]}]
    assert CompletionCollator(0)(rows)["prompt_lengths"].tolist() == [2, 1]
    assert CompletionCollator(0)([{"input_ids": [1, 2, 3]}])["prompt_lengths"].tolist() == [3]
    with pytest.raises(ReftuneError, match=r"the end of its prompt is unknown"):
        CompletionCollator(0)([{"input_ids": [1, 2], "labels": [-100, -100]}])


def test_classification_labels_are_one_a_row() -> None:
    rows = [
        {"input_ids": [1, 2, 3], "token_type_ids": [0, 0, 1], "labels": 1, "prompt_length": 3},
        {"input_ids": [1], "token_type_ids": [0], "labels": 0, "prompt_length": 1},
    ]
    batch = CompletionCollator(9)(rows)
    assert batch["labels"].tolist() == [1, 0] and batch["labels"].dtype == torch.int64
    assert batch["token_type_ids"].tolist() == [[0, 0, 1], [0, 0, 0]]
    assert batch["prompt_lengths"].tolist() == [3, 1]
    rows = [{**row, "labels": 0.5} for row in rows]
    assert CompletionCollator(9)(rows)["labels"].dtype == torch.float32


def test_options_out_of_range_are_refused() -> None:
    with pytest.raises(ReftuneError, match=r"padding_side='middle'"):
        CompletionCollator(0, "middle")
    with pytest.raises(ReftuneError, match=r"pad_to_multiple_of=0"):
        CompletionCollator(0, pad_to_multiple_of=0)
