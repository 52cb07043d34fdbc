"""Log-likelihoods of continuations of prompts, each prompt's keys and values computed once.

A prompt runs through the model one time, together with the tokens that all of its continuations begin with; what
differs then runs on copies of its keys and values, as a batch. Where every continuation differs in its last token
alone (`answer1`, `answer2`, ...), that first forward is all there is. Edits see what they would see in a full forward,
because both forwards say where the prompt ends (`prompt_lengths`).

Exact or off: `prefill_obstacle` names what would make it inexact, and one prompt is computed both ways before any.
"""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from reftune.engine.forwards import accepts_any_keyword, is_causal_lm
from reftune.engine.hooks import Engine
from reftune.errors import ReftuneError
from reftune.training.prefix.obstacles import cache_obstacle, rope_obstacle
from reftune.training.prefix.partial_forward import right_padded
from reftune.training.supervised_logits import head_sees_only, output_head, plain_model

logger = logging.getLogger(__name__)
_already_logged: set[str] = set()

OPTION_ROWS = 4
"""Continuations that run at once, in multiples of the prompts that do: they are short, and prompts are not."""


@dataclass(frozen=True)
class Continued:
    """A prompt and what may follow it, as token ids; `where` is for messages."""

    prompt: list[int]
    options: list[list[int]]
    where: str = ""

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ReftuneError(f"{self.where or 'a row'}: the prompt has no tokens")
        if not self.options:
            raise ReftuneError(f"{self.where or 'a row'}: there are no options to score")
        for number, option in enumerate(self.options, start=1):
            if not option:
                raise ReftuneError(f"{self.where or 'a row'}: option {number} has no tokens")

    @property
    def common(self) -> int:
        """How many tokens all options begin with; each keeps one of its own."""
        return min(len(os.path.commonprefix(self.options)), min(map(len, self.options)) - 1)


@torch.no_grad()
def option_log_likelihoods(
    model: nn.Module,
    rows: Sequence[Continued],
    *,
    batch_size: int = 8,
    reuse: bool = True,
    check: bool = True,
    advance: Callable[[int], None] | None = None,
) -> list[list[float]]:
    """Log-likelihood (natural logarithm, summed over its tokens) of every option after its prompt.

    Args:
        model: a causal language model of transformers, or a PEFT model of any kind around one.
        rows: prompts and options as token ids.
        batch_size: prompts of one forward pass.
        reuse: compute each prompt once where that is exact; False runs every (prompt, option) pair whole.
        check: compare one prompt's results with the whole forward's before reusing anything.
        advance: called with the number of rows that were finished.

    Returns:
        For each row, in order, one number an option.

    Raises:
        ReftuneError: the model is not a causal language model.
    """
    if not is_causal_lm(plain_model(model)):
        raise ReftuneError(
            f"{type(plain_model(model)).__name__} is not a causal language model: options are scored as continuations"
        )
    if not rows:
        return []
    # Rows of like length together: less padding. Results go back to their places.
    order = sorted(range(len(rows)), key=lambda index: len(rows[index].prompt) + rows[index].common)
    results: list[list[float]] = [[] for _ in rows]
    with _evaluating(model):
        run = _run_whole
        if reuse and any(len(row.options) > 1 for row in rows):
            reason = prefill_obstacle(model)
            if reason is None and check:
                reason = _difference(model, _shortest_telling(rows))
            if reason is None:
                run = _run_prefilled
            else:
                _log_once(f"Every option runs with its whole prompt: {reason}")
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            for index, found in zip(chosen, run(model, [rows[i] for i in chosen], batch_size), strict=True):
                results[index] = found
            if advance is not None:
                advance(len(chosen))
    return results


def prefill_obstacle(model: nn.Module) -> str | None:
    """Why a prompt's keys and values cannot serve its options on this model, or None."""
    base: Any = plain_model(model)
    configs = getattr(model, "peft_config", None)
    active = getattr(model, "active_adapter", None)
    if isinstance(configs, dict) and getattr(configs.get(active), "is_prompt_learning", False):
        return f"{configs[active].peft_type.value} puts virtual tokens before every forward"
    names = inspect.signature(base.forward).parameters
    for name in ("attention_mask", "past_key_values", "use_cache"):
        if name not in names:
            return f"the forward of {type(base).__name__} takes no {name}"
    return cache_obstacle(base.config) or rope_obstacle(base.config)


# Whole rows


def _run_whole(model: nn.Module, rows: list[Continued], batch_size: int) -> list[list[float]]:
    """One forward a (prompt, option) pair, padded on the right."""
    pairs = [(row.prompt, option) for row in rows for option in row.options]
    flat: list[float] = []
    for start in range(0, len(pairs), batch_size):
        batch = pairs[start : start + batch_size]
        # The last token predicts nothing that is asked for, but a full forward is what everybody compares with.
        ids, mask = _padded([[*prompt, *option] for prompt, option in batch], model, left=False)
        inputs = {"input_ids": ids, "attention_mask": mask, **_no_cache(model)}
        starts = [len(prompt) - 1 for prompt, _ in batch]
        options = [option for _, option in batch]
        flat += _scored(model, inputs, [len(prompt) for prompt, _ in batch], starts, options)
    numbers = iter(flat)
    return [[next(numbers) for _ in row.options] for row in rows]


# Prompts once


def _run_prefilled(model: nn.Module, rows: list[Continued], batch_size: int) -> list[list[float]]:
    base: Any = plain_model(model)
    config = base.config
    heads = [[*row.prompt, *row.options[0][: row.common]] for row in rows]
    ids, mask = _padded(heads, model, left=True)
    cache: Any = DynamicCache(config=config)
    width = ids.shape[1]
    inputs = {"input_ids": ids, "attention_mask": mask, "past_key_values": cache, "use_cache": True}
    inputs |= _positions(model, (mask.cumsum(-1) - 1).clamp(min=0))
    lengths = [len(row.prompt) for row in rows]
    # Columns that predict an option's token: from the prompt's last token on.
    columns = [(index, column) for index, row in enumerate(rows) for column in range(width - row.common - 1, width)]
    found = _logits_at(model, inputs, lengths, columns)
    totals: list[list[float]] = []
    place = 0
    for row in rows:
        here = found[place : place + row.common + 1]
        place += row.common + 1
        shared = float(here[torch.arange(row.common), row.options[0][: row.common]].sum()) if row.common else 0.0
        totals.append([shared + float(here[-1, option[row.common]]) for option in row.options])
    longer = [
        (index, number)
        for index, row in enumerate(rows)
        for number, option in enumerate(row.options)
        if len(option) > row.common + 1
    ]
    for start in range(0, len(longer), batch_size * OPTION_ROWS):
        chosen = longer[start : start + batch_size * OPTION_ROWS]
        options = [rows[index].options[number] for index, number in chosen]
        tails = [option[rows[index].common :] for (index, _), option in zip(chosen, options, strict=True)]
        which = torch.tensor([index for index, _ in chosen], device=ids.device)
        tail_ids, tail_mask = _padded([tail[:-1] for tail in tails], model, left=False)
        before = torch.tensor([len(heads[index]) for index, _ in chosen], device=ids.device)
        inputs = {
            "input_ids": tail_ids,
            "attention_mask": torch.cat([mask[which], tail_mask], dim=1),
            "past_key_values": _copied(cache, which, config),
            "use_cache": True,
        }
        inputs |= _positions(model, before.unsqueeze(1) + torch.arange(tail_ids.shape[1], device=ids.device))
        scores = _scored(model, inputs, [lengths[i] for i, _ in chosen], [0] * len(chosen), [t[1:] for t in tails])
        for (index, number), score in zip(chosen, scores, strict=True):
            totals[index][number] += score
    return totals


def _copied(cache: Any, rows: Int[Tensor, " rows"], config: Any) -> DynamicCache:
    """A fresh cache that holds the given rows of another (a row may be taken several times)."""
    fresh = DynamicCache(config=config)
    for layer, source in zip(fresh.layers, cache.layers, strict=True):
        assert isinstance(layer, DynamicLayer)  # cache_obstacle refuses every other kind
        keys, values = source.keys.index_select(0, rows), source.values.index_select(0, rows)
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.cumulative_length = source.cumulative_length
    return fresh


# One forward


def _scored(
    model: nn.Module, inputs: dict[str, Any], lengths: list[int], starts: list[int], options: list[list[int]]
) -> list[float]:
    """Sums of the log-probabilities of each row's option, whose first token is predicted in column `starts[row]`."""
    columns = [
        (row, start + step)
        for row, (start, option) in enumerate(zip(starts, options, strict=True))
        for step in range(len(option))
    ]
    found = _logits_at(model, inputs, lengths, columns)
    targets = torch.tensor([token for option in options for token in option], device=found.device)
    each = found.gather(1, targets.unsqueeze(1)).squeeze(1).double().cpu()
    return [float(part.sum()) for part in each.split([len(option) for option in options])]


def _logits_at(
    model: nn.Module, inputs: dict[str, Any], lengths: list[int], columns: list[tuple[int, int]]
) -> Float[Tensor, "columns vocab"]:
    """Log-probabilities of every next token at (row, column) of a forward; the head runs at these alone if it can."""
    batch, width = (int(size) for size in inputs["input_ids"].shape)
    device = inputs["input_ids"].device
    if Engine.of(plain_model(model)) is not None:
        inputs = {**inputs, "prompt_lengths": torch.tensor(lengths, device=device)}
    flat = torch.tensor([row * width + column for row, column in columns], device=device)
    if output_head(model) is None:
        logits, gathered = model(**inputs).logits, False
    else:
        with head_sees_only(model, flat, (batch, width)) as seen:
            logits = model(**inputs).logits
        gathered = seen.calls == 1 and seen.refused is None
    if not gathered:
        # Virtual tokens stand before the row's own.
        logits = logits[:, -width:].flatten(0, 1).index_select(0, flat.to(logits.device))
    else:
        logits = logits[0]
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits.log_softmax(-1)


def _padded(
    rows: Sequence[Sequence[int]], model: nn.Module, *, left: bool
) -> tuple[Int[Tensor, "batch width"], Int[Tensor, "batch width"]]:
    """Ids and mask; token 0 stands in the padding, which nothing attends to."""
    tensors = [torch.tensor(row[::-1] if left else row, dtype=torch.long) for row in map(list, rows)]
    ids, mask = right_padded(tensors), right_padded([torch.ones_like(row) for row in tensors])
    if left:
        ids, mask = ids.flip(1), mask.flip(1)
    device = next(model.parameters()).device if not hasattr(model, "device") else model.device
    return ids.to(device), mask.to(device)  # type: ignore[arg-type]


def _positions(model: nn.Module, positions: Tensor) -> dict[str, Tensor]:
    base = plain_model(model)
    takes = "position_ids" in inspect.signature(base.forward).parameters or accepts_any_keyword(base)
    return {"position_ids": positions} if takes else {}


def _no_cache(model: nn.Module) -> dict[str, bool]:
    configs = getattr(model, "peft_config", None)
    learnt = isinstance(configs, dict) and any(getattr(c, "is_prompt_learning", False) for c in configs.values())
    takes = "use_cache" in inspect.signature(plain_model(model).forward).parameters
    return {"use_cache": False} if takes and not learnt else {}


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for the length of a ``with`` block; every module gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


# Proof


def _shortest_telling(rows: Sequence[Continued]) -> list[Continued]:
    """Two prompts of different lengths, as short as there are, which cost little to compute twice."""
    ordered = sorted((row for row in rows if len(row.options) > 1), key=lambda row: len(row.prompt))
    other = next((row for row in ordered if len(row.prompt) > len(ordered[0].prompt)), None)
    return [ordered[0]] if other is None else [ordered[0], other]


def _difference(model: nn.Module, rows: list[Continued]) -> str | None:
    """What is wrong with results from reused prompts, or None where they equal a whole forward's."""
    few = [Continued(row.prompt, row.options[:4], row.where) for row in rows]
    pairs = [
        pair
        for one, other in zip(_run_whole(model, few, 8), _run_prefilled(model, few, 8), strict=True)
        for pair in zip(one, other, strict=True)
    ]
    dtype = next(model.parameters()).dtype
    half = dtype in (torch.float16, torch.bfloat16)
    rounding = 16 * torch.finfo(dtype).eps if half else 1e-4
    errors = [abs(one - other) / max(1.0, abs(one)) for one, other in pairs]
    wrong = [error for error in errors if not error <= rounding]  # so that NaN is wrong too
    if not wrong:
        return None
    return f"reusing prompts changes a log-likelihood by {wrong[0]:.1e} of it (allowed: {rounding:.1e})"


def _log_once(line: str) -> None:
    if line not in _already_logged:
        _already_logged.add(line)
        logger.warning(line)
