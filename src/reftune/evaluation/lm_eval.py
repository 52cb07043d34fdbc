"""Adapters in EleutherAI's lm-evaluation-harness, as the model type `reftune`.

    reftune lm-eval --model reftune --model_args peft=DIR --tasks arc_easy --apply_chat_template --batch_size 8

The harness (seen: 0.4.13) reads no entry points, so its own command `lm_eval` cannot learn of a new model type.
`reftune lm-eval` is that command with this module imported first, and takes the same arguments. From Python, import
this module and call `lm_eval.simple_evaluate(model="reftune", model_args={"peft": DIR})`, or give it a `ReftuneLM`.

Why a model type of its own: the harness joins context and continuation into one row, and `--model hf` would take the
whole row for the prompt, so that `l1` edits a token of the answer that is being scored. Here:

- log-likelihood and multiple choice: the context is the prompt. Two requests share a forward only where the tokens
  *and* the prompt's end are the same. The harness compares the tokens alone, and then reads the score of the shorter
  continuation off the wrong place (`"2 + 2" | " = 4"` beside `"2 + 2 =" | " 5"`), for any model.
- too long a row loses the beginning of its context, as in the harness; positions count on what is left of it.
- an empty context is the harness's prefix token (BOS, or EOS where there is none), which is then the prompt.
- rolling log-likelihood (perplexity of a text): a text has no prompt. The prefix token is taken for it, so the result
  is that of an empty context; in the later windows of a long text no prompt token is in sight, and prompt positions
  edit nothing. `all` and `generated` edit the text itself.
- generation: left-padded batches, edits where `generate` puts them.
- encoder-decoder models: the encoder's text is the prompt, as everywhere.
- `--apply_chat_template`: the prompt as in training, where the adapter has a `run.yaml`, with its
  `chat_template_kwargs` (others: `chat_template_args`, as for `hf`).
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor
from tqdm import tqdm

from reftune import models
from reftune.adapter.checkpoint import read_adapter_config
from reftune.adapter.config import load_adapter
from reftune.data.formats import Message
from reftune.data.templates import render_prompt, turn_opening
from reftune.engine.hooks import Engine
from reftune.errors import ReftuneError
from reftune.inference.loading import recorded_run, single_folder
from reftune.training.prompt_ends import takes_prompt_lengths
from reftune.training.supervised_logits import plain_model, supervised_forward, unsupported_reason

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise ReftuneError(
        f"lm-evaluation-harness cannot be imported ({error}): run `pip install 'reftune[eval]'`."
    ) from error

logger = logging.getLogger(__name__)

_HFLM: Any = HFLM  # the harness's decorators hide what class it is from type checkers

Score = tuple[float, bool]
"""Log-probability of a continuation in nats, and whether greedy decoding would have written it."""


@dataclass(frozen=True)
class ScoredRow:
    """One continuation to score.

    Attributes:
        text: the request's two strings, under which the harness caches its score; None for a window of a longer text.
        context: token ids before the continuation, at least one.
        continuation: token ids to score, at least one.
        prompt: how many tokens of the context are the prompt.
    """

    text: tuple[str, str] | None
    context: list[int]
    continuation: list[int]
    prompt: int


@dataclass
class _Forward:
    """A row as the model sees it, and the rows (by number) whose scores can be read off its logits."""

    tokens: list[int]
    prompt: int
    scored: int
    members: list[int] = field(default_factory=list)


@register_model("reftune")
class ReftuneLM(_HFLM):
    """The harness's `hf` model with a ReFT adapter on it, and prompts that end where contexts end.

    Args:
        pretrained: base model: a Hub name, a folder, 'smollm2' (bundled), a .gguf file, or a model (a PeftModel too,
            then without `peft`); None takes the one that the adapter was trained on.
        peft: adapter: an output folder of `reftune train`, one that PEFT saved, or a Hub name; None scores the base.
        dtype: of the base; None takes that of training, else bfloat16 on CUDA and float32 elsewhere.
        device: None takes CUDA, then MPS, then the CPU.
        quantization: '4bit' or '8bit'; None takes that of training.
        **others: everything that the harness's `hf` takes (batch_size, max_length, tokenizer, parallelize, ...).

    Raises:
        ReftuneError: neither a base nor an adapter, or an adapter that cannot be used.
    """

    def __init__(
        self,
        pretrained: Any = None,
        peft: str | None = None,
        dtype: Any = None,
        device: str | None = None,
        quantization: Any = None,
        **others: Any,
    ) -> None:
        folder = None if peft is None else single_folder(str(peft))
        self._folder = folder if folder is not None and folder.is_dir() else None
        self._run = recorded_run(self._folder) if self._folder is not None else {}
        self._own_tokenizer = not others.get("tokenizer")
        if pretrained is None:
            pretrained = _trained_on(peft, folder) or self._run.get("model")
        if not pretrained:
            raise ReftuneError("There is no model: give --model_args peft=DIR, pretrained=NAME or both.")
        device = device or _best_device()
        dtype = dtype or self._run.get("dtype") or ("bfloat16" if device.startswith("cuda") else "float32")
        quantization = quantization or (self._run.get("quantization") if isinstance(pretrained, str) else None)
        if isinstance(pretrained, str) and (quantization or pretrained.lower().endswith(".gguf")):
            pretrained, tokenizer = models.load(pretrained, dtype, device, quantization=quantization)
            others.setdefault("tokenizer", tokenizer)
        if pretrained == models.BUNDLED:
            pretrained = str(models.bundled_folder())
        if recorded := self._run.get("chat_template_kwargs"):
            others["chat_template_args"] = {**recorded, **(others.get("chat_template_args") or {})}
        super().__init__(pretrained=pretrained, peft=peft, dtype=dtype, device=device, **others)
        if not isinstance(pretrained, str) and peft is not None:
            self._model = self._with_adapter(peft)
        if not isinstance(self.model, PeftModel):
            logger.warning("No adapter (peft=DIR) was given: the base model is scored.")

    def _create_tokenizer(self, *args: Any, **others: Any) -> None:
        super()._create_tokenizer(*args, **others)
        if self._folder is not None and self._own_tokenizer:
            self.tokenizer = models.saved_tokenizer(self._folder, self.tokenizer)

    def _with_adapter(self, peft: str) -> PeftModel:
        if self._folder is not None and self._own_tokenizer:
            models.fit_to_tokenizer(cast(Any, self._model), self.tokenizer)
        folder = Path(str(peft)).expanduser()
        return (
            load_adapter(self._model, folder)
            if _is_local(folder)
            else PeftModel.from_pretrained(self._model, str(peft))
        )

    def _create_model(self, *args: Any, peft: str | None = None, **others: Any) -> None:
        # The harness would also shrink the vocabulary to the tokenizer's, which changes every probability where a
        # model's embedding is padded.
        super()._create_model(*args, peft=None, **others)
        if peft is not None:
            self._model = self._with_adapter(peft)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as the model reads it; as in training where there is a record of it."""
        if not self._run:
            return super().apply_chat_template(chat_history, add_generation_prompt)
        template, arguments = self._run.get("template"), self.chat_template_args or None
        asked = chat_history if add_generation_prompt else chat_history[:-1]
        messages = [Message(turn["role"], turn["content"]) for turn in asked]
        prompt = render_prompt(messages, self.tokenizer, template, self._run.get("system_prompt"), arguments)
        if add_generation_prompt:
            return prompt
        return prompt + turn_opening(self.tokenizer, template, arguments) + chat_history[-1]["content"]

    # Log-likelihood

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None) -> Any:
        if self.backend != "causal":
            return super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm, override_bs=override_bs)
        rows = [ScoredRow(text, context, continuation, len(context)) for text, context, continuation in requests]
        return self.score(rows, disable_tqdm)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts, in nats (see the module's text for what counts as their prompt)."""
        if self.backend != "causal":
            return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)
        engine = Engine.of(plain_model(self.model))
        active = engine.active_positions() if engine is not None else {}
        if any(not positions.everywhere for positions in active.values()):
            logger.warning("Perplexity of texts: they have no prompt, so the prefix token alone is taken for one.")
        rows: list[ScoredRow] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for number, (context, continuation) in enumerate(map(make_disjoint_window, windows)):
                rows.append(ScoredRow(None, context, continuation, len(context) if number == 0 else 0))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self.score(rows, disable_tqdm), strict=True):
            totals[owner] += value
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def score(self, rows: Sequence[ScoredRow], disable_tqdm: bool = False) -> list[Score]:
        """Score continuations, each with its own prompt end, in their order.

        Args:
            rows: what to score; a row of more than `max_length` + 1 tokens loses the beginning of its context.
            disable_tqdm: without a progress bar.

        Raises:
            ReftuneError: a row without context or continuation, or a continuation longer than `max_length`.
        """
        forwards = _shared(rows, self.max_length)
        scores: list[Score] = [(0.0, False)] * len(rows)
        hidden = disable_tqdm or self.rank != 0
        with tqdm(total=len(rows), disable=hidden, desc="Running loglikelihood requests") as bar:
            for batch in self._batches(forwards):
                for one, logits in zip(batch, self._continuation_logits(batch), strict=True):
                    log_probabilities = logits.log_softmax(-1, dtype=self.softmax_dtype or torch.float32)
                    greedy = log_probabilities.argmax(-1)
                    for member in one.members:
                        wanted = torch.tensor(rows[member].continuation, device=logits.device)
                        chosen = log_probabilities.gather(-1, wanted.unsqueeze(-1))
                        scores[member] = float(chosen.sum()), bool((greedy == wanted).all())
                        if rows[member].text is not None:
                            self.cache_hook.add_partial("loglikelihood", rows[member].text, scores[member])
                        bar.update()
        return scores

    def _batches(self, forwards: list[_Forward]) -> Iterator[list[_Forward]]:
        """Longest rows first; `auto:N` looks for the largest size that fits at N places of that order."""
        automatic = self.batch_size == "auto"
        parts = max(1, int(self.batch_schedule)) if automatic else 1
        for part in range(parts):
            rows = forwards[part * len(forwards) // parts : (part + 1) * len(forwards) // parts]
            if not rows:
                continue
            longest = (None, rows[0].tokens, rows[0].tokens[:1])  # the harness leaves the last token out
            size = self._detect_batch_size([longest]) if automatic else int(self.batch_size)
            yield from (rows[start : start + size] for start in range(0, len(rows), size))

    def _continuation_logits(self, batch: list[_Forward]) -> Sequence[Tensor]:
        """The scores at each row's continuation, (scored, vocabulary) a row, by one forward padded on the right."""
        longest = max(len(one.tokens) for one in batch)
        tokens = torch.zeros(len(batch), longest, dtype=torch.long)
        wanted = torch.full((len(batch), longest), -100)
        for row, one in enumerate(batch):
            tokens[row, : len(one.tokens)] = torch.tensor(one.tokens)
            wanted[row, len(one.tokens) - one.scored : len(one.tokens)] = 0
        inputs = {"input_ids": tokens.to(self.device)}
        if takes_prompt_lengths(self.model):
            inputs["prompt_lengths"] = torch.tensor([one.prompt for one in batch], device=self.device)
        precision = self.mixed_precision_dtype
        with torch.no_grad(), torch.autocast(self.device.type, dtype=precision, enabled=precision is not None):
            if unsupported_reason(self.model) is None:
                logits = supervised_forward(self.model, {**inputs, "shift_labels": wanted.to(self.device)}).logits[0]
            else:
                logits = self.model(**inputs).logits
                logits = logits[(wanted != -100).to(logits.device)]
        return logits.split([one.scored for one in batch])


def _shared(rows: Sequence[ScoredRow], max_length: int) -> list[_Forward]:
    """One forward for all rows that differ in the last token to score alone; longest first."""
    found: dict[tuple[int, int, tuple[int, ...]], _Forward] = {}
    cut = 0
    for number, row in enumerate(rows):
        if not row.context or not row.continuation or len(row.continuation) > max_length:
            raise ReftuneError(
                f"request {row.text!r}: {len(row.context)} tokens of context and {len(row.continuation)} to score; it "
                f"takes one or more of each, and no more than max_length={max_length} to score."
            )
        lost = max(0, len(row.context) + len(row.continuation) - (max_length + 1))
        cut += lost > 0
        tokens = [*row.context, *row.continuation[:-1]][lost:]
        key = max(0, row.prompt - lost), len(row.continuation), tuple(tokens)
        one = found.setdefault(key, _Forward(tokens, key[0], key[1]))
        one.members.append(number)
    if cut:
        logger.warning(
            "%s of %s requests are longer than max_length=%s and lose the beginning of their context: positions count "
            "on what is left of it.", cut, len(rows), max_length,
        )  # fmt: skip
    return sorted(found.values(), key=lambda one: -len(one.tokens))


def _trained_on(peft: str | None, folder: Path | None) -> str | None:
    """The base model that an adapter records."""
    if peft is None or folder is None:
        return None
    if _is_local(folder):
        return read_adapter_config(folder).get("base_model_name_or_path")
    return PeftConfig.from_pretrained(str(peft)).base_model_name_or_path


def _is_local(folder: Path) -> bool:
    """Whether this is a path rather than a Hub name (`owner/name`), also where nothing is there."""
    return folder.exists() or folder.is_absolute() or len(folder.parts) != 2


def _best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def run_harness(arguments: Sequence[str]) -> None:
    """The harness's own command line, with the model type `reftune`; **sets `sys.argv` while it runs**.

    Args:
        arguments: as for `lm_eval`; `--model reftune` where they name no model.
    """
    from lm_eval.__main__ import cli_evaluate

    given = list(arguments)
    runs = bool(given) and given[0] not in ("ls", "validate", "-h", "--help")
    names = ("--model", "-M", "--config", "-C")
    if runs and not any(one.partition("=")[0] in names for one in given):
        given += ["--model", "reftune"]
    before = sys.argv
    sys.argv = ["lm_eval", *given]
    try:
        cli_evaluate()
    finally:
        sys.argv = before
