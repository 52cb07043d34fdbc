from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from reftune.data.classification import LabelScheme, label_scheme, read_texts
from reftune.data.formats import LabelledText
from reftune.data.tokenising import encode_dataset
from reftune.errors import ReftuneError
from tests.tiny_classifier import classifier_tokenizer


def labelled(*labels: Any) -> list[LabelledText]:
    return [LabelledText(f"text {n}", label, None, f"f.csv, row {n + 2}") for n, label in enumerate(labels)]


@pytest.mark.parametrize(
    ("columns", "pair"),
    [
        (("text",), False), (("text", "text_pair"), True), (("sentence",), False), (("sentence1", "sentence2"), True),
        (("question1", "question2"), True), (("premise", "hypothesis"), True), (("question", "sentence"), True),
    ],
)  # fmt: skip
def test_the_columns_of_every_glue_task_are_known(columns: tuple[str, ...], pair: bool, tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text(f"idx,{','.join(columns)},label\n0,{','.join(f'the {name}' for name in columns)},1\n")
    (row,) = read_texts(file)
    assert row.text == f"the {columns[0]}" and row.label == "1"
    assert row.text_pair == (f"the {columns[1]}" if pair else None)


def test_columns_can_be_mapped() -> None:
    (row,) = read_texts([{"review": "good", "stars": 4}], columns={"text": "review", "label": "stars"})
    assert (row.text, row.label) == ("good", 4)


def test_one_text_of_a_pair_may_be_empty_and_not_both() -> None:
    assert read_texts([{"question1": "", "question2": "why?", "label": 0}])[0].text_pair == "why?"
    with pytest.raises(ReftuneError, match="row 1: 'question1' is empty"):
        read_texts([{"question1": " ", "question2": None, "label": 0}])


def test_rows_to_predict_need_no_label() -> None:
    assert read_texts([{"sentence": "good"}], labelled=False)[0].text == "good"
    with pytest.raises(ReftuneError, match="column 'label' is missing"):
        read_texts([{"sentence": "good"}])


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"sentence1": "a", "label": 1}], "hold none of"),
        ([{"sentence": "a", "label": 1}, {"sentense": "b", "label": 1}], "row 2: column 'sentence' is missing.*sentense'"),
        ([{"sentence": "a", "label": None}], "row 1: 'label' is empty"),
        ([{"sentence": "a", "label": float("nan")}], "row 1: 'label' is empty"),
        ([{"sentence": "a", "label": [1]}], "row 1: 'label' is a list"),
        ([{"sentence": ["a"], "label": 1}], "row 1: 'sentence' is a list"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_by_row_and_column(rows: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(ReftuneError, match=words):
        read_texts(rows)


def test_a_column_that_the_task_needs_is_named() -> None:
    with pytest.raises(ReftuneError, match="column 'premise' is missing"):
        read_texts([{"sentence": "a", "label": 1}], names=("premise", "hypothesis"))


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ((1, 0, 2), ("0", "1", "2")), (("1", "0"), ("0", "1")), (("yes", "no", "yes"), ("no", "yes")),
        ((1.0, 0.0), ("0", "1")), ((0.5, 3, 2), ()), (("0.5", "4"), ()), ((0, 3), ("0", "1", "2", "3")),
    ],
)  # fmt: skip
def test_labels_are_ids_names_or_numbers_to_predict(labels: tuple[Any, ...], names: tuple[str, ...]) -> None:
    assert label_scheme(labelled(*labels)).names == names


def test_names_and_their_numbers_mean_the_same() -> None:
    scheme = LabelScheme(("entailment", "neutral", "contradiction"))
    assert {scheme.read(row).label for row in labelled("neutral", 1, "1", 1.0)} == {"neutral"}
    assert LabelScheme(()).read(labelled("3.8")[0]).label == 3.8


@pytest.mark.parametrize(
    ("labels", "given", "words"),
    [
        ((1, 1), None, r"f.csv: all 2 rows have the label '1'"),
        (("yes",), ("no", "yes"), "all 1 rows have the label 'yes'"),
        (("yes", "maybe"), ("no", "yes"), r"row 3: label 'maybe' is not among the classes no, yes \(or their numbers"),
        (("yes", "yess"), ("no", "yes"), "did you mean 'yes'"),
        ((0, 7), ("no", "yes"), "row 3: label 7 is not among"),
        ((0, -1), ("no", "yes"), "label -1 marks a row without a label"),
        ((0, 1999), None, "row 3: label 1999 is no class number.*labels: number"),
        (("a", 1), "number", None),
    ],
)  # fmt: skip
def test_labels_that_cannot_be_learnt_are_refused(labels: tuple[Any, ...], given: Any, words: str | None) -> None:
    if words is None:
        with pytest.raises(ReftuneError, match="row 2: label 'a' is not a number"):
            label_scheme(labelled(*labels), given).read(labelled(*labels)[0])
        return
    with pytest.raises(ReftuneError, match=words):
        label_scheme(labelled(*labels), given)


def test_the_whole_input_is_the_prompt_and_its_first_token_is_the_classifiers() -> None:
    tokenizer = classifier_tokenizer()
    rows = [LabelledText("ab", "no", "cd"), LabelledText("abc", "yes")]
    pair, single = encode_dataset(rows, tokenizer, label_names=["no", "yes"])
    assert tokenizer.decode(pair["input_ids"]) == "<s>ab</s></s>cd</s>"
    assert tokenizer.decode(single["input_ids"]) == "<s>abc</s>"
    assert (pair["prompt_length"], single["prompt_length"]) == (8, 5)
    assert (pair["labels"], single["labels"]) == (0, 1)


def test_a_number_among_names_is_a_name_and_a_missing_one_is_told(tmp_path: Path) -> None:
    rows = [LabelledText("a", "x"), LabelledText("b", 1)]
    scheme = label_scheme(rows)
    assert scheme.names == ("1", "x") and [scheme.read(row).label for row in rows] == ["x", "1"]
    ids = [LabelledText("a", 0), LabelledText("b", 2.0), LabelledText("c", "1")]
    assert [label_scheme(ids).read(row).label for row in ids] == ["0", "2", "1"]
    path = tmp_path / "rows.csv"
    path.write_text("text,label\na,1.0\nb,NaN\nc,0.0\n")
    with pytest.raises(ReftuneError, match=r"rows.csv, row 3.*label"):
        read_texts(path)
