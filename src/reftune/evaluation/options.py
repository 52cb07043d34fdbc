"""Which of several options a model finds likeliest after a prompt.

Rows are `{prompt, options: [...], answer}`, from a file, from memory, or made of a task's rows (`evaluation.tasks`).
An option's score is its log-likelihood as the continuation of the prompt; `acc` picks the highest sum, `acc_norm` the
highest sum a UTF-8 byte of the option (the names of lm-evaluation-harness), and `acc_token` the highest mean a token.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from transformers import PreTrainedTokenizerBase

from reftune.data.messages import read_message
from reftune.data.reading import RawRow, Source, read_rows
from reftune.data.tokenising import Encoding
from reftune.data.values import parse_json
from reftune.errors import ReftuneError
from reftune.evaluation.prefill import Continued, option_log_likelihoods

Norm = Literal["acc", "acc_norm", "acc_token"]
NORMS: tuple[Norm, ...] = ("acc", "acc_norm", "acc_token")


@dataclass(frozen=True)
class OptionRow:
    """A prompt (text, or the messages of a conversation), its options, and the index of the right one if known."""

    prompt: Any
    options: tuple[str, ...]
    answer: int | None = None
    where: str = ""


@dataclass(frozen=True)
class OptionScores:
    """One row's scores, an entry an option.

    Attributes:
        log_likelihoods: natural logarithms, summed over the option's tokens.
        tokens: how many those are.
        bytes: the option's length in UTF-8.
        answer: index of the right option, if known.
    """

    log_likelihoods: tuple[float, ...]
    tokens: tuple[int, ...]
    bytes: tuple[int, ...]
    answer: int | None = None

    def chosen(self, norm: Norm = "acc") -> int:
        """Index of the likeliest option; of equals, the first."""
        scales = {"acc": (1,) * len(self.tokens), "acc_norm": self.bytes, "acc_token": self.tokens}[norm]
        scores = [value / scale for value, scale in zip(self.log_likelihoods, scales, strict=True)]
        return scores.index(max(scores))

    def right(self, norm: Norm = "acc") -> bool:
        """Whether the likeliest option is the right one.

        Raises:
            ReftuneError: the row has no answer.
        """
        if self.answer is None:
            raise ReftuneError("this row has no answer, so its options can be scored but not judged")
        return self.chosen(norm) == self.answer


def evaluate_options(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[OptionRow | Mapping[str, Any]],
    *,
    encoding: Encoding | None = None,
    batch_size: int = 8,
    reuse: bool = True,
    check: bool = True,
    advance: Callable[[int], None] | None = None,
) -> list[OptionScores]:
    """Score the options of every row; each prompt runs through the model once.

    Args:
        model: a causal language model of transformers, or a PEFT model (ReFT, LoRA, prompt tuning, ...) around one.
        tokenizer: its tokenizer.
        rows: `OptionRow`s, or mappings with `prompt`, `options` and (optionally) `answer`.
        encoding: how prompts become tokens, as in training (its template, its system prompt, its limit); where None,
            the tokenizer's chat template if it has one. `Encoding(tokenizer, "%s")` takes prompts as they are.
        batch_size: prompts of one forward pass.
        reuse: False runs every (prompt, option) pair whole.
        check: prove on one prompt, before anything is reused, that both ways give the same.
        advance: called with the number of rows that were finished.

    Returns:
        One `OptionScores` a row, in order. `[s.right("acc_norm") for s in scores]` is what `intervals` take.

    Raises:
        ReftuneError: naming the row: no options, an empty one, an answer that is none of them, a row longer than the
            encoding's limit; or the model is not a causal language model.
    """
    encoding = encoding or Encoding(tokenizer)
    known = [row if isinstance(row, OptionRow) else option_row(row, f"row {n}") for n, row in enumerate(rows, 1)]
    encoded = _encoded(known, encoding)
    found = option_log_likelihoods(model, encoded, batch_size=batch_size, reuse=reuse, check=check, advance=advance)
    return [_scores(row, ids, values) for row, ids, values in zip(known, encoded, found, strict=True)]


def _scores(row: OptionRow, ids: Continued, values: Sequence[float]) -> OptionScores:
    """An option's own share: where the template opens an answer (see `_encoded`), what that costs is taken off."""
    opened, opening = (values[-1], len(ids.options[-1])) if len(values) > len(row.options) else (0.0, 0)
    own = range(len(row.options))
    return OptionScores(
        tuple(values[index] - opened for index in own),
        tuple(len(ids.options[index]) - opening for index in own),
        tuple(len(option.encode()) for option in row.options),
        row.answer,
    )


def _encoded(rows: Sequence[OptionRow], encoding: Encoding) -> list[Continued]:
    """Tokens of the rows: each option behind what the template puts before an answer, and that once alone, last."""
    if not rows:
        return []
    prompts = encoding.prompt_ids([row.prompt for row in rows])
    # Options are tokenised apart from their prompt, as completions are in training: no token spans the boundary.
    ids: Any = iter(encoding.answer_ids([option for row in rows for option in row.options]))
    encoded = []
    for prompt, row in zip(prompts, rows, strict=True):
        options = [next(ids) for _ in row.options]
        opening = encoding.opening_ids
        alone = [opening] if opening and all(option[: len(opening)] == opening for option in options) else []
        encoded.append(Continued(prompt, options + alone, row.where))
    for row in encoded:
        length = len(row.prompt) + max(map(len, row.options))
        if encoding.limit is not None and length > encoding.limit:
            raise ReftuneError(
                f"{row.where or 'a row'}: prompt and longest option have {length} tokens, more than the limit of "
                f"{encoding.limit}: shorten the row"
            )
    return encoded


def read_option_rows(source: Source, *, split: str = "test", limit: int | None = None) -> list[OptionRow]:
    """Read rows with `prompt`, `options` and `answer`.

    Args:
        source: a file (JSON, JSONL, CSV, ...), a Hub dataset, or rows in memory (see `data.reading.read_rows`). In CSV
            `options` is a JSON list, or texts separated by `|`.
        split: split of a Hub dataset.
        limit: read only the first rows.

    Raises:
        ReftuneError: naming file, row and field.
    """
    return [option_row(row.values, row.where) for row in read_rows(source, split=split)[:limit]]


def option_row(values: Mapping[str, Any] | RawRow, where: str = "") -> OptionRow:
    """One row of `{prompt, options, answer}`; the answer is an index from 0, or the text of an option, or absent."""
    if isinstance(values, RawRow):
        values, where = values.values, values.where
    place = where or "the row"
    for name in ("prompt", "options"):
        if values.get(name) in (None, "", []):
            state = "is empty" if name in values else "is missing"
            raise ReftuneError(f"{place}: field {name!r} {state}; this row has: {', '.join(map(str, values))}")
    options = _options(values["options"], place)
    return OptionRow(_prompt(values["prompt"], place), options, _answer(values.get("answer"), options, place), where)


def _prompt(value: Any, place: str) -> Any:
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence) and all(isinstance(turn, Mapping) and "role" in turn for turn in value):
        return [read_message(turn, f"{place}: 'prompt'[{index}]") for index, turn in enumerate(value)]
    raise ReftuneError(f"{place}: 'prompt' is a {type(value).__name__}; give text or a list of messages")


def _options(value: Any, place: str) -> tuple[str, ...]:
    if isinstance(value, str):
        try:
            value = parse_json(value, f"{place}: 'options'") if value.lstrip().startswith("[") else value.split("|")
        except json.JSONDecodeError as error:
            raise ReftuneError(f"{place}: 'options' begins like a JSON list and is none: {error}") from error
    if not isinstance(value, Sequence) or not all(isinstance(option, str) and option for option in value):
        raise ReftuneError(f"{place}: 'options' must be a list of texts, none of them empty")
    return tuple(value)


def _answer(value: Any, options: tuple[str, ...], place: str) -> int | None:
    if value is None or value == "":
        return None
    if isinstance(value, str) and value in options:
        return options.index(value)
    stripped = [option.strip() for option in options]
    if isinstance(value, str) and value.strip() in stripped:
        return stripped.index(value.strip())
    index = int(value) if isinstance(value, int) or str(value).strip().isdecimal() else -1
    if isinstance(value, bool) or not 0 <= index < len(options):
        raise ReftuneError(
            f"{place}: 'answer' is {value!r}; give the text of an option or its index from 0 to {len(options) - 1}"
        )
    return index
