"""From examples to token ids and labels, with an exact boundary between prompt and completion."""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypedDict, cast

import datasets
from transformers import PreTrainedTokenizerBase

from reftune.data.formats import Example, LabelledText, Message
from reftune.data.templates import behind, render_prompt, render_turn, resolve_template, turn_end, turn_opening
from reftune.data.values import check_text
from reftune.errors import ReftuneError
from reftune.output import terminal

IGNORED = -100
"""The label of a token that is not learnt."""

REJECTED = "rejected_"
"""What the columns of a pair's negative answer begin with."""

_CHUNK = 512

logger = logging.getLogger(__name__)


class Encoded(TypedDict):
    """One tokenised example: `prompt_length` tokens of prompt, whose labels are -100, then the completion."""

    input_ids: list[int]
    labels: list[int]
    prompt_length: int


@dataclass(frozen=True)
class Encoding:
    """How examples are tokenised; one object for training, evaluation and generation.

    Args:
        tokenizer: the base model's.
        template: a raw template, or None for the chat template (see `templates.render_prompt`).
        system_prompt: for examples without a system message.
        max_length: most tokens of a row, at least 2; None takes the tokenizer's limit, if it states one.
        on_long_prompt: "truncate" drops the beginning of a prompt that does not fit, "error" names its row.
        chat_template_kwargs: arguments of the chat template (`enable_thinking`).
        before: turns that stand before every prompt: an instruction, answered examples.
    """

    tokenizer: PreTrainedTokenizerBase
    template: str | None = None
    system_prompt: str | None = None
    max_length: int | None = None
    on_long_prompt: str = "truncate"
    chat_template_kwargs: Mapping[str, Any] | None = None
    before: tuple[Message, ...] = ()

    def __post_init__(self) -> None:
        """Refuse a limit or policy that cannot be, and arguments of a chat template that is not used."""
        if self.chat_template_kwargs and resolve_template(self.tokenizer, self.template) is not None:
            raise ReftuneError(f"chat_template_kwargs={dict(self.chat_template_kwargs)}: no chat template is used here")
        if self.max_length is not None and self.max_length < 2:
            raise ReftuneError(f"max_length={self.max_length}: a row needs a prompt token and a label, so at least 2")
        if self.on_long_prompt not in ("truncate", "error"):
            raise ReftuneError(f"on_long_prompt={self.on_long_prompt!r}: use 'truncate' or 'error'")

    @property
    def limit(self) -> int | None:
        """The most tokens of a row, or None; a tokenizer without a limit states an enormous one."""
        if self.max_length is not None:
            return self.max_length
        stated = self.tokenizer.model_max_length
        return int(stated) if stated and stated < 10_000_000 else None

    def prompt_ids(self, prompts: Sequence[Any]) -> list[list[int]]:
        """Token ids of prompts (examples, messages or plain text) as the model reads them, BOS at most once."""
        return self._prompt_ids([self.render(prompt) for prompt in prompts], prompts)

    def render(self, prompt: Any) -> str:
        """A prompt as text (see `templates.render_prompt`)."""
        prompt = self._behind(prompt)
        return render_prompt(prompt, self.tokenizer, self.template, self.system_prompt, self.chat_template_kwargs)

    def _behind(self, prompt: Any) -> Any:
        return behind(self.before, prompt, self.system_prompt) if self.before else prompt

    def turn(self, example: Example) -> tuple[str, str]:
        """A prompt, and its completion with the end of its turn, as text (see `templates.render_turn`)."""
        example = self._behind(example)
        return render_turn(example, self.tokenizer, self.template, self.system_prompt, self.chat_template_kwargs)

    def turn_ids(self, examples: Sequence[Example]) -> list[tuple[list[int], list[int]]]:
        """Token ids of each example's prompt, and of its completion as the model has to write it."""
        turns = [self.turn(example) for example in examples]
        prompts = self._prompt_ids([prompt for prompt, _ in turns], examples)
        for (_, completion), example in zip(turns, examples, strict=True):
            check_text(completion, f"{_where(example)}the completion")
        return list(zip(prompts, self._ids([completion for _, completion in turns], bos=False), strict=True))

    def _prompt_ids(self, rendered: Sequence[str], prompts: Sequence[Any]) -> list[list[int]]:
        for prompt, text in zip(prompts, rendered, strict=True):
            check_text(text, f"{_where(prompt)}the prompt")
        ids = self._ids(list(rendered))
        for prompt, row in zip(prompts, ids, strict=True):
            if not row:
                raise ReftuneError(f"{_where(prompt)}the prompt has no tokens; ReFT needs at least one to edit")
        return ids

    def answer_text(self, ids: Sequence[int]) -> str:
        """What a model wrote, without special tokens and without what the template puts before an answer."""
        return self.without_opening(str(self.tokenizer.decode(list(ids), skip_special_tokens=True)).strip())

    def without_opening(self, text: str) -> str:
        """A decoded answer without what the template puts before it, an empty `<think></think>` for instance."""
        return text.removeprefix(self.shown_opening).lstrip() if self.shown_opening else text

    def answer_ids(self, answers: Sequence[str]) -> list[list[int]]:
        """Token ids of answers as they stand behind a prompt, without the end of the turn."""
        return self._ids([self._opening + answer for answer in answers], bos=False) if answers else []

    @cached_property
    def _opening(self) -> str:
        return turn_opening(self.tokenizer, self.template, self.chat_template_kwargs)

    @cached_property
    def opening_ids(self) -> list[int]:
        """Token ids of what the template puts between prompt and answer; empty for most."""
        return self._ids([self._opening], bos=False)[0] if self._opening else []

    @cached_property
    def shown_opening(self) -> str:
        """The same as people would see it, without special tokens."""
        return str(self.tokenizer.decode(self.opening_ids, skip_special_tokens=True)).strip()

    def _ids(self, texts: list[str], *, bos: bool = True) -> list[list[int]]:
        ids = cast("list[list[int]]", self.tokenizer(texts, add_special_tokens=False, verbose=False).input_ids)
        start = self._bos() if bos else None
        if start is None:
            return ids
        return [row if row[:1] == [start] else [start, *row] for row in ids]

    def _bos(self) -> int | None:
        """The BOS id where this tokenizer adds one; chat templates write their own, so none is added after them."""
        if resolve_template(self.tokenizer, self.template) is None:
            return None
        return cast("int | None", self.tokenizer.bos_token_id) if self.tokenizer_writes_bos else None

    @cached_property
    def tokenizer_writes_bos(self) -> bool:
        """Whether the tokenizer itself puts BOS before a text, where it is asked for special tokens."""
        start = self.tokenizer.bos_token_id
        return start is not None and self.tokenizer("a").input_ids[:1] == [start]

    def end_ids(self) -> list[int]:
        """Token ids that end the model's turn."""
        return self._ids([turn_end(self.tokenizer, self.template)], bos=False)[0]

    def stop_ids(self) -> frozenset[int]:
        """Token ids that end an answer: the eos token, and the special one that closed completions in training."""
        closing = set(self.end_ids()[-1:]) & set(self.tokenizer.all_special_ids)
        eos = cast("int | None", self.tokenizer.eos_token_id)
        return frozenset(closing if eos is None else {*closing, eos})

    def dataset(
        self,
        rows: Sequence[Example] | Sequence[LabelledText],
        *,
        label_names: Sequence[str] | None = None,
        progress: bool = False,
    ) -> datasets.Dataset:
        """Rows as `encode_dataset` gives them; arguments and errors as there."""
        if not rows:
            raise ReftuneError("there are no rows to tokenise: give at least one example")
        cut: Counter[str] = Counter()
        if isinstance(rows[0], LabelledText):
            labelled = cast("Sequence[LabelledText]", rows)
            names = list(label_names) if label_names is not None else find_label_names(labelled)
            encoded: Iterator[Any] = _encode_labelled(labelled, self, names, cut)
        else:
            encoded = _encode(cast("Sequence[Example]", rows), self, cut)
        if progress:
            from rich.progress import track

            encoded = iter(
                track(encoded, "Tokenising", total=len(rows), console=terminal.console(stderr=True), transient=True)
            )
        columns: dict[str, list[Any]] = {}
        for row in encoded:
            for key, value in row.items():
                columns.setdefault(key, []).append(value)
        for what, count in sorted(cut.items()):
            logger.warning("%s of %s rows: %s (limit %s tokens)", count, len(rows), what, self.limit)
        return datasets.Dataset.from_dict(columns)

    def encoded(self, rows: Sequence[Example], cut: Counter[str]) -> Iterator[Encoded]:
        """Rows one after another, as `dataset` has them; what had to be cut is counted in ``cut``."""
        return _encode(rows, self, cut)

    def pairs(self, rows: Sequence[Example], *, progress: bool = False) -> datasets.Dataset:
        """Rows with a second, worse answer: the columns of `dataset`, and of that answer behind `REJECTED`."""
        others = self.dataset([replace(row, completion=row.rejected or "", more={}) for row in rows], progress=progress)
        others = others.rename_columns({name: REJECTED + name for name in others.column_names})
        return datasets.concatenate_datasets([self.dataset(rows, progress=progress), others], axis=1)

    def generation_prompt(self, prompt: Any, *, room: int = 0) -> list[int]:
        """Token ids to generate from, cut from the left like training prompts so that `room` new tokens fit."""
        ids = self.prompt_ids([prompt])[0]
        if self.limit is None or len(ids) + room <= self.limit:
            return ids
        return self._cut_prompt(ids, max(1, self.limit - room))

    def _cut_prompt(self, prompt: list[int], keep: int) -> list[int]:
        """The last `keep` tokens; a BOS at the front stays, because models lean on it (a turn marker is not one)."""
        start = cast("int | None", self.tokenizer.bos_token_id)
        if start is not None and keep > 1 and prompt[0] == start and prompt.count(start) == 1:
            return [start, *prompt[len(prompt) - keep + 1 :]]
        return prompt[len(prompt) - keep :]


def encode_example(
    example: Example,
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str | None = None,
    system_prompt: str | None = None,
    max_length: int | None = None,
    on_long_prompt: str = "truncate",
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Encoded:
    """Return the ids, labels and prompt length of one example.

    Prompt and completion are tokenised apart and then joined, so no token spans the boundary. A row longer than
    `max_length` loses the beginning of its prompt; only where the completion fills the limit by itself is it cut too,
    and the prompt then keeps up to half. A prompt token and a label always remain.

    Raises:
        ReftuneError: an argument of `Encoding` is out of range, or a prompt is too long with `on_long_prompt="error"`.
    """
    encoding = Encoding(tokenizer, template, system_prompt, max_length, on_long_prompt, chat_template_kwargs)
    return next(_encode([example], encoding, Counter()))


def encode_dataset(
    rows: Sequence[Example] | Sequence[LabelledText],
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str | None = None,
    system_prompt: str | None = None,
    max_length: int | None = None,
    on_long_prompt: str = "truncate",
    label_names: Sequence[str] | None = None,
    progress: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> datasets.Dataset:
    """Return a dataset with the columns `input_ids`, `labels` and `prompt_length`, in the order of `rows`.

    Labelled text gives one label a row (its index in `label_names`, which defaults to `find_label_names(rows)`; a float
    for regression), and its whole text counts as the prompt. Rows that had to be cut are counted in one logged warning.

    Args:
        rows: examples, or labelled texts; not empty.
        tokenizer: the base model's.
        template: see `Encoding`; not used for labelled text.
        system_prompt: see `Encoding`; not used for labelled text.
        max_length: see `Encoding`.
        on_long_prompt: see `Encoding`.
        label_names: class names in the order of their ids; give the training rows' when encoding evaluation rows.
        progress: show a progress bar on stderr.
        chat_template_kwargs: see `Encoding`; not used for labelled text.

    Raises:
        ReftuneError: there are no rows, a label is not in `label_names`, or as for `encode_example`.
    """
    encoding = Encoding(tokenizer, template, system_prompt, max_length, on_long_prompt, chat_template_kwargs)
    return encoding.dataset(rows, label_names=label_names, progress=progress)


def _encode(examples: Sequence[Example], encoding: Encoding, cut: Counter[str]) -> Iterator[Encoded]:
    for start in range(0, len(examples), _CHUNK):
        chunk = examples[start : start + _CHUNK]
        for example, (prompt, completion) in zip(chunk, encoding.turn_ids(chunk), strict=True):
            prompt, completion = _fit(prompt, completion, encoding, _where(example), cut)
            labels = [IGNORED] * len(prompt) + completion
            yield {"input_ids": prompt + completion, "labels": labels, "prompt_length": len(prompt)}


def _fit(
    prompt: list[int], completion: list[int], encoding: Encoding, where: str, cut: Counter[str]
) -> tuple[list[int], list[int]]:
    limit = encoding.limit
    if limit is None or len(prompt) + len(completion) <= limit:
        return prompt, completion
    room = limit - len(completion)
    if room < 1:
        room = min(len(prompt), limit // 2)
        completion = completion[: limit - room]
        cut["the completion alone fills the limit and lost its end"] += 1
    if room < len(prompt):
        if encoding.on_long_prompt == "error":
            raise ReftuneError(
                f"{where}the prompt has {len(prompt)} tokens and only {room} fit beside its completion: raise "
                f"max_length={limit}, shorten the row, or cut it with --long-prompts truncate "
                "(on_long_prompt='truncate')"
            )
        cut["the prompt is too long and lost its beginning"] += 1
        prompt = encoding._cut_prompt(prompt, room)
    return prompt, completion


def find_label_names(rows: Sequence[LabelledText]) -> list[str]:
    """Return the class names of `rows` in the order of their ids; none where labels are floats (regression).

    Whole numbers, in text or not, are ids themselves ("0", "1", ... up to the largest); names are sorted.
    """
    labels = {row.label for row in rows}
    if any(isinstance(label, float) for label in labels):
        return []
    texts = {str(label) for label in labels}
    if all(text.isdecimal() for text in texts):
        return [str(index) for index in range(max(map(int, texts)) + 1)]
    return sorted(texts)


def _encode_labelled(
    rows: Sequence[LabelledText], encoding: Encoding, names: list[str], cut: Counter[str]
) -> Iterator[dict[str, Any]]:
    ids_of = {name: index for index, name in enumerate(names)}
    for row in rows:
        if not names:
            try:
                label: int | float = float(row.label)
            except ValueError as error:
                raise ReftuneError(f"{_where(row)}label {row.label!r} is not a number, and other rows' are") from error
        elif (known := ids_of.get(str(row.label))) is not None:
            label = known
        else:
            raise ReftuneError(f"{_where(row)}label {row.label!r} is not among the classes: {', '.join(names)}")
        whole = encoding.tokenizer(row.text, row.text_pair, verbose=False)
        if encoding.limit is not None and len(whole.input_ids) > encoding.limit:
            if encoding.on_long_prompt == "error":
                raise ReftuneError(
                    f"{_where(row)}the text has {len(whole.input_ids)} tokens: raise max_length={encoding.limit}, "
                    "shorten the row, or cut it with --long-prompts truncate (on_long_prompt='truncate')"
                )
            cut["the text is too long and lost its end"] += 1
            whole = encoding.tokenizer(row.text, row.text_pair, truncation=True, max_length=encoding.limit)
        features: dict[str, Any] = {key: whole[key] for key in ("input_ids", "token_type_ids") if key in whole}
        yield {**features, "labels": label, "prompt_length": len(whole["input_ids"])}


def _where(row: Any) -> str:
    return f"{row.where}: " if getattr(row, "where", "") else ""
