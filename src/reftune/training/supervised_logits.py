"""Logits at supervised positions only.

The output head multiplies every hidden state with the whole vocabulary, though only the completion is learned: on
prompt-heavy data that is most of a small model's step. A forward pre-hook on the head keeps the rows whose next token
is supervised, so (batch, sequence, hidden) becomes (1, supervised, hidden) and whatever the model does with its logits
afterwards (soft-capping, scaling) still happens. No forward is replaced; the hook is gone when the call returns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss

from reftune.training.loss import IGNORED_LABEL


class SupervisedLogitsError(RuntimeError):
    """This model's logits cannot be restricted to supervised positions; the message says why."""


@dataclass
class SupervisedLogits:
    """What one forward gave: scores, what they should have predicted, whose they are, and the model's own output."""

    logits: Float[Tensor, "1 supervised vocab"]
    targets: Int[Tensor, "1 supervised"]
    rows: Int[Tensor, " supervised"]
    outputs: Any


@dataclass
class HeadGather:
    """What the pre-hook saw: how often the head ran, and the shape of what it was given when the rows did not fit."""

    calls: int = 0
    refused: tuple[int, ...] | None = None


def shifted(labels: Int[Tensor, "batch sequence"]) -> Int[Tensor, "batch sequence"]:
    """What each token is to predict: ``labels[b, t + 1]`` at ``[b, t]``, and -100 at the last token."""
    return nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL)


def supervised_rows(
    shift_labels: Int[Tensor, "batch sequence"],
) -> tuple[Int[Tensor, " supervised"], Int[Tensor, " supervised"]]:
    """The flat indices b * sequence + t with ``shift_labels[b, t] != -100``, and those labels."""
    flat = shift_labels.flatten()
    rows = (flat != IGNORED_LABEL).nonzero().squeeze(1)
    return rows, flat[rows]


def plain_model(model: nn.Module) -> nn.Module:
    """The transformers model under distributed wrappers and PEFT."""
    inner: Any = extract_model_from_parallel(model, keep_torch_compile=False)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def output_head(model: nn.Module) -> nn.Module | None:
    """The module that turns hidden states into logits (also where PEFT has wrapped it), or None."""
    base: Any = plain_model(model)
    try:
        head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    except NotImplementedError:
        return None
    return head if isinstance(head, nn.Module) else None


def unsupported_reason(model: nn.Module) -> str | None:
    """Why this model must compute all logits and its own loss, or None where the supervised ones are enough."""
    base = plain_model(model)
    config = getattr(base, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        return "an encoder-decoder predicts its labels unshifted"
    if output_head(model) is None:
        return f"{type(base).__name__} has no output embeddings"
    if getattr(base, "loss_function", None) is not ForCausalLMLoss:
        return f"{type(base).__name__} does not use the causal language model loss"
    if getattr(config, "output_router_logits", False):
        return "its loss has a second term, the router's auxiliary loss"
    if isinstance(model, nn.DataParallel):
        return "DataParallel copies the head to several devices"
    if any(getattr(m, "_compiled_call_impl", None) is not None or hasattr(m, "_orig_mod") for m in model.modules()):
        return "a compiled model does not notice a hook that changes at every step"
    return None


@contextmanager
def head_sees_only(model: nn.Module, rows: Int[Tensor, " supervised"], shape: tuple[int, int]) -> Iterator[HeadGather]:
    """Let the head see only the given rows while the context lasts; **installs a hook, and always removes it**.

    Args:
        model: any wrapping of a causal language model.
        rows: flat indices into (batch, sequence).
        shape: (batch, sequence); a hidden state of another shape goes through whole and is reported.

    Raises:
        SupervisedLogitsError: the model has no output embeddings.
    """
    head = output_head(model)
    if head is None:
        raise SupervisedLogitsError(f"{type(plain_model(model)).__name__} has no output embeddings")
    seen = HeadGather()

    def keep_rows(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        seen.calls += 1
        name = None if args else next((key for key, value in kwargs.items() if isinstance(value, Tensor)), None)
        hidden = args[0] if args else kwargs.get(name or "")
        if not isinstance(hidden, Tensor) or hidden.ndim != 3 or tuple(hidden.shape[:2]) != shape:
            seen.refused = tuple(getattr(hidden, "shape", ()))
            return None
        kept = hidden.flatten(0, 1).index_select(0, rows.to(hidden.device)).unsqueeze(0)
        return ((kept, *args[1:]), kwargs) if args else (args, {**kwargs, str(name): kept})

    handle = head.register_forward_pre_hook(keep_rows, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def supervised_forward(model: nn.Module, inputs: Mapping[str, Any]) -> SupervisedLogits:
    """Run the model without its labels and return the logits at supervised positions.

    Args:
        model: a causal language model, wrapped or not (see `unsupported_reason`).
        inputs: its keyword arguments with ``labels`` (batch, sequence), -100 where nothing is learned; or with
            ``shift_labels``, which say at each token what it is to predict (the name that transformers gives them).

    Returns:
        Logits (1, supervised, vocabulary), targets (1, supervised), the batch row of each, and the model's output.

    Raises:
        SupervisedLogitsError: the head saw something else than one (batch, sequence, hidden) tensor, so that its rows
            cannot be told apart.
    """
    arguments = dict(inputs)
    labels: Tensor = arguments.pop("shift_labels") if "shift_labels" in arguments else shifted(arguments.pop("labels"))
    shape = (int(labels.shape[0]), int(labels.shape[1]))
    rows, targets = supervised_rows(labels)
    with head_sees_only(model, rows, shape) as seen:
        outputs = model(**arguments)
    logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
    if seen.calls == 0 and tuple(logits.shape[:2]) == shape:  # the head's weight was used without calling the module
        logits = logits.flatten(0, 1).index_select(0, rows.to(logits.device)).unsqueeze(0)
    elif seen.calls != 1 or seen.refused is not None:
        raise SupervisedLogitsError(
            f"its head ran {seen.calls} times, on a tensor of shape {seen.refused}, and the labels are {shape}"
        )
    return SupervisedLogits(logits, targets.to(logits.device).unsqueeze(0), rows // shape[1], outputs)


def joined(parts: Sequence[SupervisedLogits], members: Sequence[Sequence[int]]) -> SupervisedLogits:
    """Forwards of parts of a batch as if they were one.

    Args:
        parts: what they gave.
        members: of each part, the rows of the batch that it is made of.

    Returns:
        Logits, targets and rows one part after another, and the last one's output.
    """
    rows = [torch.tensor(own, device=part.rows.device)[part.rows] for own, part in zip(members, parts, strict=True)]
    logits = torch.cat([part.logits for part in parts], dim=1) if len(parts) > 1 else parts[0].logits
    targets = torch.cat([part.targets for part in parts], dim=1)
    return SupervisedLogits(logits, targets, torch.cat(rows), parts[-1].outputs)
