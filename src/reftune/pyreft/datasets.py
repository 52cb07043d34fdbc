"""pyreft's dataset classes: rows of token ids, labels and ``intervention_locations``.

Where pyreft puts a padding token in front of every row to have somewhere to point short lists at, nothing is put here:
locations count the row's own tokens from 0, and -1 means no token. ``legacy_positions=True`` brings back the
second-to-last token as ``l1`` in the classes that had it (see docs/migrating.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, cast

import datasets
import torch
from torch.utils.data import Dataset

from reftune.data.reading import read_rows
from reftune.errors import ReftuneError
from reftune.pyreft.encoding import encode_pair, labels_of
from reftune.pyreft.locations import get_intervention_locations

PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\n%s\n\n### Input:\n%s\n\n### Response:\n"
)
PROMPT_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n%s\n\n### Response:\n"
)
"""The prompts of the Alpaca data, which pyreft's supervised and preference classes use."""


class ReftDataset(Dataset[Any]):
    """The base of pyreft's dataset classes; a subclass writes ``preprocess`` and ``tokenize``.

    Args:
        task: a name for the data.
        data_path: a file or dataset that ``reftune.data`` reads, or the configuration of the Hub dataset ``task``; not
            needed with ``dataset``.
        tokenizer: the base model's.
        data_split: ``"train"`` or another split.
        dataset: the rows themselves.
        seed: of the choice among the rows.
        max_n_example: most rows; None: all.
        **kwargs: the subclass's fields, and ``position`` (``"f7+l7"``), ``num_interventions``, ``share_weights``,
            ``legacy_positions``.

    Raises:
        ReftuneError: neither rows nor a path, or a field that is missing.
    """

    legacy_offset: ClassVar[int] = 0
    needs: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        task: str,
        data_path: str | None,
        tokenizer: Any,
        data_split: str = "train",
        dataset: Any = None,
        seed: int = 42,
        max_n_example: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.task, self.data_path, self.data_split = task, data_path, data_split
        self.tokenizer = tokenizer
        self.dataset, self.seed, self.max_n_example = dataset, seed, max_n_example
        self.positions = kwargs.get("position", kwargs.get("positions", "l1"))
        self.num_interventions = int(kwargs.get("num_interventions", 1))
        self.share_weights = bool(kwargs.get("share_weights", False))
        self.legacy_positions = bool(kwargs.get("legacy_positions", False))
        self.raw_dataset: Any = None
        self.preprocess(kwargs)
        self.task_dataset = self.load_dataset()
        if self.data_split != "train":
            self.raw_dataset = self.task_dataset
        self.postprocess(kwargs)
        self.result: list[dict[str, Any]] = []
        for index, row in enumerate(cast("Iterable[dict[str, Any]]", self.task_dataset)):
            result, prompt_length = self.tokenize(row)
            self.result.append(self.compute_intervention_and_subspaces(index, row, result, prompt_length, **kwargs))

    def preprocess(self, kwargs: Mapping[str, Any]) -> None:
        """Take the fields' names out of the constructor's arguments."""
        for name in self.needs:
            if name not in kwargs:
                raise ReftuneError(f"{type(self).__name__} needs {name}=: the name of a column.")
            setattr(self, name, kwargs[name])

    def postprocess(self, kwargs: Mapping[str, Any]) -> None:
        """Called once, when the rows are there and none is tokenised; it may choose among ``task_dataset``."""

    def tokenize(self, data_item: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
        """A row's columns, and the number of its prompt tokens."""
        raise NotImplementedError

    def load_dataset(self) -> datasets.Dataset:
        """The rows.

        Raises:
            ReftuneError: a file or dataset that cannot be read.
        """
        found = self.dataset
        if found is None and (self.data_path is None or _is_configuration(self.data_path)):
            try:
                found = datasets.load_dataset(self.task, self.data_path, split=self.data_split)
            except Exception as error:  # the Hub's, the network's and the reader's errors share no base class
                what = self.task if self.data_path is None else f"{self.task} ({self.data_path})"
                raise ReftuneError(
                    f"task={self.task!r}: the dataset {what} cannot be loaded ({error}). Give dataset= (rows), or a "
                    "file as data_path=."
                ) from None
        elif found is None:
            found = [row.values for row in read_rows(self.data_path, split=self.data_split)]
        rows = (
            found if isinstance(found, datasets.Dataset) else datasets.Dataset.from_list([dict(row) for row in found])
        )
        if self.max_n_example is not None and self.max_n_example < len(rows):
            rows = rows.shuffle(seed=self.seed).select(range(self.max_n_example))
        return rows

    def get_intervention_locations(self, **kwargs: Any) -> list[list[int]]:
        """As the function of that name."""
        return get_intervention_locations(**kwargs)

    def compute_intervention_and_subspaces(
        self, id: int, data_item: Mapping[str, Any], result: dict[str, Any], last_position: int, **kwargs: Any
    ) -> dict[str, Any]:
        """Add ``intervention_locations``, and ``subspaces`` where there are any; **changes ``result``**."""
        result["intervention_locations"] = self.get_intervention_locations(
            last_position=max(1, last_position - (self.legacy_offset if self.legacy_positions else 0)),
            positions=self.positions,
            num_interventions=self.num_interventions,
            share_weights=self.share_weights,
        )
        result["id"] = id
        subspaces = data_item["subspaces"] if "subspaces" in data_item else kwargs.get("subspaces")
        if subspaces is not None:
            nested = bool(subspaces) and isinstance(subspaces[0], (list, tuple))
            result["subspaces"] = list(subspaces) if nested else [list(subspaces)] * self.num_interventions
        return result

    def __len__(self) -> int:
        return len(self.result)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return dict(self.result[index])


def _is_configuration(data_path: str) -> bool:
    """Whether ``data_path`` is no file but a configuration's name, as in ``load_dataset("gsm8k", "main")``."""
    return not Path(data_path).suffix and "/" not in data_path and not Path(data_path).exists()


def _supervised(tokenizer: Any, prompt: str, output: str) -> tuple[dict[str, Any], int]:
    ids, length = encode_pair(tokenizer, prompt, output)
    return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels_of(ids, length))}, length


class ReftSupervisedDataset(ReftDataset):
    """Instruction data in Alpaca's prompt: ``instruction_field``, ``input_field`` and ``output_field``."""

    legacy_offset = 1
    needs = ("instruction_field", "input_field", "output_field")

    def __init__(self, *args: Any, no_stop: bool = False, **kwargs: Any) -> None:
        self.no_stop = no_stop
        super().__init__(*args, **kwargs)

    def tokenize(self, data_item: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
        """Ids and labels."""
        fields: Any = self
        prompt = _alpaca_prompt(data_item, fields.instruction_field, fields.input_field)
        end = "" if self.no_stop else str(self.tokenizer.eos_token)
        return _supervised(self.tokenizer, prompt, str(data_item[fields.output_field]) + end)


class ReftGenerationDataset(ReftDataset):
    """Plain text: ``prompt_field`` and ``completion_field``."""

    legacy_offset = 1
    needs = ("prompt_field", "completion_field")

    def tokenize(self, data_item: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
        """Ids and labels."""
        fields: Any = self
        output = str(data_item[fields.completion_field]) + str(self.tokenizer.eos_token)
        return _supervised(self.tokenizer, str(data_item[fields.prompt_field]), output)


class ReftRawDataset(ReftDataset):
    """Rows with ``instruction`` and ``output`` as the model is to see them, and perhaps ``subspaces``."""

    def tokenize(self, data_item: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
        """Ids and labels."""
        output = str(data_item["output"]) + str(self.tokenizer.eos_token)
        return _supervised(self.tokenizer, str(data_item["instruction"]), output)


class ReftClassificationDataset(ReftDataset):
    """Text and a class: ``input_field`` (a column or a pair of them), ``label_field``; all tokens are the prompt."""

    needs = ("input_field", "label_field")

    def tokenize(self, data_item: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
        """Ids and the class."""
        fields: Any = self
        names = [fields.input_field] if isinstance(fields.input_field, str) else list(fields.input_field)
        texts = [str(data_item[name]) for name in names]
        ids = self.tokenizer(*texts, truncation=True, max_length=_limit(self.tokenizer)).input_ids
        return {"input_ids": torch.tensor(ids), "labels": data_item[fields.label_field]}, len(ids)


class ReftPreferenceDataset(ReftDataset):
    """Alpaca's prompt with the chosen output as what is learned; ``rejected_output_field`` is kept beside it."""

    needs = ("instruction_field", "input_field", "chosen_output_field", "rejected_output_field")

    def tokenize(self, data_item: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
        """Ids and labels of the chosen output."""
        fields: Any = self
        prompt = _alpaca_prompt(data_item, fields.instruction_field, fields.input_field)
        output = str(data_item[fields.chosen_output_field]) + str(self.tokenizer.eos_token)
        return _supervised(self.tokenizer, prompt, output)


class ReftRewardDataset(ReftDataset):
    """Two conversations, ``conv_A_field`` (preferred unless the rewards say otherwise) and ``conv_B_field``.

    Each is a list of messages in the chat template, or text; ``prompt_field`` may name the prompt. With
    ``conv_A_reward_field`` and ``conv_B_reward_field`` the one with the higher reward is the chosen one. Locations are
    those of the tokens that both have in common, up to where they part.
    """

    needs = ("conv_A_field", "conv_B_field")

    def preprocess(self, kwargs: Mapping[str, Any]) -> None:
        """Take the fields' names out of the constructor's arguments."""
        super().preprocess(kwargs)
        self.prompt_field = kwargs.get("prompt_field")
        self.conv_A_reward_field = kwargs.get("conv_A_reward_field")
        self.conv_B_reward_field = kwargs.get("conv_B_reward_field")

    def tokenize(self, data_item: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
        """Ids of the chosen and the rejected conversation, and their masks."""
        fields: Any = self
        chosen, rejected = (self._ids(data_item[name]) for name in (fields.conv_A_field, fields.conv_B_field))
        if self.conv_A_reward_field is not None and self.conv_B_reward_field is not None:
            if data_item[self.conv_A_reward_field] < data_item[self.conv_B_reward_field]:
                chosen, rejected = rejected, chosen
        shared = 0
        while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
            shared += 1
        row = {
            "chosen_output": torch.tensor(chosen),
            "rejected_output": torch.tensor(rejected),
            "chosen_output_mask": torch.ones(len(chosen), dtype=torch.long),
            "rejected_output_mask": torch.ones(len(rejected), dtype=torch.long),
        }
        return row, max(1, shared)

    def _ids(self, conversation: Any) -> list[int]:
        limit = _limit(self.tokenizer)
        if isinstance(conversation, str):
            return list(self.tokenizer(conversation, truncation=True, max_length=limit).input_ids)
        text = self.tokenizer.apply_chat_template(conversation, tokenize=False)
        return list(self.tokenizer(text, add_special_tokens=False, truncation=True, max_length=limit).input_ids)


def _alpaca_prompt(row: Mapping[str, Any], instruction: str, extra: str | None) -> str:
    text = row.get(extra) if extra else None
    return PROMPT_WITH_INPUT % (row[instruction], text) if text else PROMPT_WITHOUT_INPUT % row[instruction]


def _limit(tokenizer: Any) -> int:
    return min(int(tokenizer.model_max_length), 1_000_000)
