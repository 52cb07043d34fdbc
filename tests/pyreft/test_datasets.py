"""pyreft's data helpers and dataset classes: their columns as pyreft 0.1.0 gave them, and its faults mended."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DataCollatorForSeq2Seq

import reftune.pyreft as pyreft
from reftune.errors import ReftuneError
from reftune.pyreft.encoding import encode_pair
from tests.cli.tiny_folder import tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


def test_the_last_position_module_edits_the_last_prompt_token(tokenizer: Any) -> None:
    module = pyreft.make_last_position_supervised_data_module(
        tokenizer, None, ["abcd", "x"], ["yes", "no"], num_interventions=2
    )
    assert set(module) == {"train_dataset", "eval_dataset", "data_collator"} and module["eval_dataset"] is None
    assert module["train_dataset"].column_names == ["input_ids", "intervention_locations", "labels"]
    first, second = module["train_dataset"]
    assert first["intervention_locations"] == [[3], [3]] and second["intervention_locations"] == [[0], [0]]
    end = tokenizer.eos_token_id
    assert first["labels"] == [-100] * 4 + tokenizer("yes").input_ids + [end]
    assert first["input_ids"] == tokenizer("abcdyes").input_ids + [end]
    batch = module["data_collator"]([first, second])
    assert {name: tuple(value.shape) for name, value in batch.items()} == {
        "input_ids": (2, 8),
        "attention_mask": (2, 8),
        "labels": (2, 8),
        "intervention_locations": (2, 2, 1),
    }


def test_the_end_token_can_be_left_out(tokenizer: Any) -> None:
    module = pyreft.make_last_position_supervised_data_module(tokenizer, None, ["a"], ["b"], nonstop=True)
    assert module["train_dataset"][0]["labels"] == [-100, *tokenizer("b").input_ids]


def test_the_multiple_position_module_halves_untied_interventions(tokenizer: Any) -> None:
    module = pyreft.make_multiple_position_supervised_data_module(
        tokenizer, None, ["abcdefgh", "x"], ["yes", "no"], positions="f2+l3", num_interventions=2
    )
    first, second = module["train_dataset"]
    assert first["intervention_locations"] == [[0, 1, -1], [5, 6, 7]]  # pyreft: [0, 1, 8], of which 8 is the response
    assert second["intervention_locations"] == [[-1, -1, -1], [0, -1, -1]]  # pyreft: the response's token 1, ten times
    batch = module["data_collator"]([first, second])  # pyreft: an error, as the lists differ in length
    assert batch["intervention_locations"].shape == (2, 2, 3)


def test_left_padding_moves_the_locations_along(tokenizer: Any) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = "left"
    module = pyreft.make_last_position_supervised_data_module(tokenizer, None, ["abcd", "x"], ["yes", "no"])
    batch = module["data_collator"](list(module["train_dataset"]))
    for row in range(2):
        (place,) = batch["intervention_locations"][row, 0].tolist()
        assert batch["labels"][row, place] == -100 and batch["labels"][row, place + 1] != -100


def test_a_long_prompt_keeps_its_label(tokenizer: Any) -> None:
    ids, length = encode_pair(tokenizer, "a" * 300, "bc", max_length=10)
    assert length == 8 and ids == tokenizer("a" * 8 + "bc").input_ids
    ids, length = encode_pair(tokenizer, "abc", "d" * 300, max_length=10)
    assert len(ids) == 10 and length == 3
    ids, length = encode_pair(tokenizer, "a" * 300, "d" * 300, max_length=10)
    assert len(ids) == 10 and length == 5
    with pytest.raises(ReftuneError, match="each needs at least one token"):
        encode_pair(tokenizer, "", "b")


class _Merging:
    """Joins "ab" into one token, so that prompt "a" with output "b" has no boundary."""

    model_max_length = 100

    def __call__(self, text: str, add_special_tokens: bool = True) -> Any:
        parts = text.replace("ab", "Z")
        ids = ([1] if add_special_tokens else []) + [ord(letter) for letter in parts]
        return type("Encoding", (), {"input_ids": ids})


def test_no_token_spans_the_boundary() -> None:
    assert encode_pair(_Merging(), "xa", "b") == ([1, ord("x"), ord("a"), ord("b")], 3)


INSTRUCTIONS = [
    {"instruction": "Greet.", "input": "in French", "output": "Salut", "chosen": "Salut", "rejected": "Hi"},
    {"instruction": "Count.", "input": "", "output": "1 2", "chosen": "1 2", "rejected": "2"},
]


def _supervised(tokenizer: Any, **more: Any) -> Any:
    fields: dict[str, Any] = {"instruction_field": "instruction", "input_field": "input", "output_field": "output"}
    return pyreft.ReftSupervisedDataset("alpaca", None, tokenizer, dataset=INSTRUCTIONS, **fields, **more)


def test_the_supervised_dataset_writes_alpacas_prompt(tokenizer: Any) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 1000
    rows = _supervised(tokenizer, position="l1")
    text = tokenizer.decode(rows[0]["input_ids"])
    assert text.startswith("Below is an instruction that describes a task, paired with an input")
    assert text.endswith("### Input:\nin French\n\n### Response:\nSalut<|im_end|>")
    assert "paired" not in tokenizer.decode(rows[1]["input_ids"])
    assert rows[0]["id"] == 0 and len(rows) == 2
    supervised = (rows[0]["labels"] != -100).nonzero()[0].item()
    assert rows[0]["intervention_locations"] == [[supervised - 1]]


def test_pyrefts_second_to_last_token_can_be_had_back(tokenizer: Any) -> None:
    ours, theirs = _supervised(tokenizer, position="l1"), _supervised(tokenizer, position="l1", legacy_positions=True)
    for new, old in zip(ours, theirs, strict=True):
        assert old["intervention_locations"][0][0] == new["intervention_locations"][0][0] - 1


def test_the_stop_token_can_be_left_out_of_supervised_rows(tokenizer: Any) -> None:
    assert _supervised(tokenizer)[0]["input_ids"][-1] == tokenizer.eos_token_id
    assert _supervised(tokenizer, no_stop=True)[0]["input_ids"][-1] != tokenizer.eos_token_id


def test_the_other_dataset_classes_make_rows(tokenizer: Any) -> None:
    def make(cls: Any, rows: list[dict[str, Any]], **fields: Any) -> Any:
        return cls("task", None, tokenizer, dataset=rows, position="l1", **fields)

    plain = make(pyreft.ReftGenerationDataset, [{"p": "ab", "c": "cd"}], prompt_field="p", completion_field="c")
    assert tokenizer.decode(plain[0]["input_ids"]) == "abcd<|im_end|>"
    assert plain[0]["intervention_locations"] == [[1]]

    raw = make(pyreft.ReftRawDataset, [{"instruction": "ab", "output": "cd", "subspaces": [0]}], num_interventions=2,
               share_weights=True)  # fmt: skip
    assert raw[0]["subspaces"] == [[0], [0]] and raw[0]["intervention_locations"] == [[1], [1]]

    classes = make(
        pyreft.ReftClassificationDataset, [{"a": "x", "b": "y", "y": 1}], input_field=["a", "b"], label_field="y"
    )
    assert classes[0]["labels"] == 1 and classes[0]["intervention_locations"] == [[len(classes[0]["input_ids"]) - 1]]

    pairs = make(pyreft.ReftPreferenceDataset, INSTRUCTIONS, instruction_field="instruction", input_field="input",
                 chosen_output_field="chosen", rejected_output_field="rejected")  # fmt: skip
    assert tokenizer.decode(pairs[0]["input_ids"]).endswith("Salut<|im_end|>")


def test_a_missing_field_is_named(tokenizer: Any) -> None:
    with pytest.raises(ReftuneError, match="ReftGenerationDataset needs completion_field="):
        pyreft.ReftGenerationDataset("x", None, tokenizer, dataset=[], prompt_field="p")
    with pytest.raises(ReftuneError, match="Give dataset="):
        pyreft.ReftRawDataset("x", None, tokenizer)


def test_a_sample_of_the_rows_depends_on_the_seed_alone(tokenizer: Any) -> None:
    rows = [{"instruction": str(n), "output": "x"} for n in range(50)]

    def chosen(seed: int) -> list[str]:
        data: Any = pyreft.ReftRawDataset("x", None, tokenizer, dataset=rows, seed=seed, max_n_example=5)
        return [row["instruction"] for row in data.task_dataset]

    assert chosen(1) == chosen(1) != chosen(2) and len(chosen(1)) == 5


def test_reward_rows_come_in_pairs_with_the_better_one_first(tokenizer: Any) -> None:
    rows = [{"p": "q", "a": "abX", "b": "abYY", "ra": 0.1, "rb": 0.9}]
    fields: dict[str, Any] = {"conv_A_field": "a", "conv_B_field": "b", "prompt_field": "p"}
    rewards: dict[str, Any] = {"conv_A_reward_field": "ra", "conv_B_reward_field": "rb"}
    data = pyreft.ReftRewardDataset("x", None, tokenizer, dataset=rows, position="l1", **fields, **rewards)
    batch = pyreft.ReftRewardCollator(tokenizer)([data[0]])
    assert tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True) == ["abYY", "abX"]
    assert batch["intervention_locations"].tolist() == [[[1]], [[1]]]
    plain = pyreft.ReftRewardDataset("x", None, tokenizer, dataset=rows, position="l1", **fields)
    assert tokenizer.decode(plain[0]["chosen_output"]) == "abX"


def test_the_collator_keeps_subspaces_and_ids(tokenizer: Any) -> None:
    rows = [
        {"instruction": "ab", "output": "c", "subspaces": [0]},
        {"instruction": "abc", "output": "c", "subspaces": [0, 1]},
    ]
    data = pyreft.ReftRawDataset("x", None, tokenizer, dataset=rows, position="f1+l1", share_weights=True)
    batch = pyreft.ReftDataCollator(DataCollatorForSeq2Seq(tokenizer))([data[0], data[1]])
    assert batch["subspaces"].tolist() == [[[0, -1]], [[0, 1]]]
    assert batch["id"].tolist() == [0, 1]
    assert torch.equal(batch["intervention_locations"][:, 0], torch.tensor([[0, 1], [0, 2]]))


def test_a_subclass_chooses_among_its_rows_before_they_are_tokenised() -> None:
    import datasets

    class Own(pyreft.ReftDataset):
        def postprocess(self, kwargs: Any) -> None:
            self.task_dataset = self.raw_dataset = self.task_dataset.select(range(kwargs["first"], 3))

        def tokenize(self, data_item: Any) -> Any:
            return {"input_ids": torch.tensor([1, 2, data_item["a"]])}, 2

    rows = [{"a": number} for number in range(5)]
    own = Own("task", None, None, dataset=rows, first=1, max_n_example=3)
    drawn = datasets.Dataset.from_list(rows).shuffle(seed=42).select(range(3)).to_list()[1:]
    assert isinstance(own.task_dataset, datasets.Dataset)
    assert own.task_dataset.to_list() == own.raw_dataset.to_list() == drawn
    assert [int(own[n]["input_ids"][2]) for n in range(2)] == [row["a"] for row in drawn]


def test_the_hubs_dataset_is_asked_for_by_task_and_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[Any] = []

    def load(*names: Any, split: str) -> Any:
        asked.append((*names, split))
        return datasets.Dataset.from_list([{"instruction": "a", "output": "b"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    for path in ("main", None):
        assert len(pyreft.ReftRawDataset("gsm8k", path, tiny_tokenizer(), data_split="test")) == 1
    assert asked == [("gsm8k", "main", "test"), ("gsm8k", None, "test")]


def test_a_prompt_field_may_be_left_out_of_reward_rows() -> None:
    rows = [{"a": "good day", "b": "good night"}]
    made = pyreft.ReftRewardDataset("x", None, tiny_tokenizer(), dataset=rows, conv_A_field="a", conv_B_field="b")
    assert made[0]["intervention_locations"] == [[len("good ") - 1]]
