import pytest
from hypothesis import given
from hypothesis import strategies as st

from reftune.data.formats import Example, Message
from reftune.data.splitting import split_rows
from reftune.errors import ReftuneError


@given(st.integers(2, 60), st.floats(0.01, 0.99), st.integers(0, 9))
def test_every_row_goes_to_one_side_and_neither_side_is_empty(count: int, fraction: float, seed: int) -> None:
    rows = list(range(count))
    train, evaluation = split_rows(rows, eval_fraction=fraction, seed=seed)
    assert sorted(train + evaluation) == rows and train and evaluation
    assert train == sorted(train) and evaluation == sorted(evaluation)
    assert split_rows(rows, eval_fraction=fraction, seed=seed) == (train, evaluation)


def test_another_seed_holds_out_other_rows() -> None:
    rows = list(range(100))
    assert split_rows(rows, eval_fraction=0.1, seed=0) != split_rows(rows, eval_fraction=0.1, seed=1)


def test_turns_of_one_conversation_stay_on_one_side() -> None:
    rows = [Example((Message("user", str(i)),), "x", f"f.jsonl, row {i // 3}") for i in range(30)]
    train, evaluation = split_rows(rows, eval_fraction=0.3, seed=0)
    assert not {row.where for row in train} & {row.where for row in evaluation}
    assert len(evaluation) == 9


def test_no_fraction_keeps_all_and_an_evaluation_file_is_used_as_it_is() -> None:
    assert split_rows([1, 2]) == ([1, 2], [])
    assert split_rows([1, 2], eval_rows=[3]) == ([1, 2], [3])


def test_impossible_splits_are_refused() -> None:
    with pytest.raises(ReftuneError, match=r"eval_fraction=1\.5: give a share"):
        split_rows([1, 2], eval_fraction=1.5)
    with pytest.raises(ReftuneError, match=r"1 row cannot be split"):
        split_rows([1], eval_fraction=0.5)
    with pytest.raises(ReftuneError, match=r"both given: choose one"):
        split_rows([1, 2], eval_fraction=0.5, eval_rows=[3])
