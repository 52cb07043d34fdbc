"""What the arguments of a Hugging Face forward say: batch, tokens, cache, labels, whatever the model calls them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from reftune.errors import ReftuneError

Role = Literal["only", "encoder", "decoder"]

NO_PROMPT_IN_TRAINING = (
    "Training a causal language model at prompt positions needs to know where each prompt ends, and this forward has "
    "neither labels nor prompt_lengths (label smoothing, for one, takes the labels away). Send prompt_lengths (batch,) "
    "with the batch, as reftune's collators do, or use positions='all'; where nothing is trained, call "
    "model.eval(). For trainers that choose the model's arguments themselves, as TRL's ORPO, CPO, GKD and "
    "OnlineDPO do, docs/how-to/trainers.md has the lines that pass it."
)
NO_PROMPT_UNCACHED = (
    "This forward was asked for without a cache (use_cache=False) and does not say where its prompt ends: as a step of "
    "a hand-written decoding loop it would edit generated tokens. Pass prompt_lengths (batch,), or use "
    "model.generate(...)."
)
PACKED_GENERATION = (
    "This packed forward (continuous batching) does not say where the prompts of its requests end: its manager was "
    "made before the edits were. Make a new one with model.init_continuous_batching(...) or call "
    "model.generate_batch(...)."
)


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether the model has an encoder and a decoder stack."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def is_causal_lm(model: nn.Module) -> bool:
    """Whether the model generates text from a prompt with one stack (so that its 2-D labels mark where prompts end)."""
    can_generate = getattr(model, "can_generate", None)
    return bool(can_generate is not None and can_generate()) and not is_encoder_decoder(model)


def accepts_any_keyword(module: nn.Module) -> bool:
    """Whether the module's forward takes ``**kwargs``."""
    parameters = inspect.signature(module.forward).parameters.values()
    return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)


def bind(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The forward's arguments by name."""
    if not args:
        return dict(kwargs)
    names = [
        name
        for name, parameter in inspect.signature(module.forward).parameters.items()
        if parameter.kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    ]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def cached_tokens(cache: Any) -> Any:
    """Tokens per row already in a key-value cache (0 for none); a static cache's count, not its size.

    Returns:
        An int; inside a graph of ``torch.compile`` a static cache's own tensor, as its value must not be looked at.
    """
    if cache is None or not hasattr(cache, "get_seq_length"):
        return 0
    count = cache.get_seq_length()
    return int(count) if isinstance(count, Tensor) and not torch.compiler.is_compiling() else count


def token_arguments(
    arguments: Mapping[str, Any], role: Role, model: nn.Module, needs_prompt: bool = True
) -> dict[str, Any] | None:
    """The part of a forward's arguments that ``positions.read_layout`` takes, for one of the model's stacks.

    Args:
        arguments: the forward's arguments by name.
        role: the stack's role; a decoder's prompt is its decoder input, an encoder's is the whole row.
        model: the model or stack whose forward it is.
        needs_prompt: whether the prompt's end is to be read from these arguments.

    Returns:
        Keyword arguments for ``read_layout``, or None when the forward has no token input for that stack (images, or an
        encoder that ran before).

    Raises:
        ReftuneError: a kind of forward that cannot be right (continuous batching).
    """
    if needs_prompt and ("read_index" in arguments or "write_index" in arguments):
        raise ReftuneError(PACKED_GENERATION)
    prefix = "decoder_" if role == "decoder" and "decoder_input_ids" in _names(model) else ""
    tokens = _first(arguments, f"{prefix}input_ids", f"{prefix}inputs_embeds")
    labels = arguments.get("labels")
    if tokens is None and prefix and isinstance(labels, Tensor):
        tokens = labels
    if tokens is None or tokens.ndim < 2:
        return None
    found: dict[str, Any] = {
        "batch": tokens.shape[0],
        "sequence": tokens.shape[1],
        "device": tokens.device,
        "attention_mask": arguments.get(f"{prefix}attention_mask"),
        "past_length": 0 if role == "encoder" else cached_tokens(arguments.get("past_key_values")),
        "needs_prompt": needs_prompt,
    }
    if role == "encoder":
        return found
    if role == "only":
        found["position_ids"] = arguments.get("position_ids")
        found["document_starts"] = arguments.get("cu_seq_lens_q")
    if not needs_prompt:
        return found
    if isinstance(labels, Tensor) and (role == "decoder" or is_causal_lm(model)) and labels.ndim == 2:
        found["labels"] = labels
        found["label_offset"] = 1 if role == "decoder" else 0
    if is_causal_lm(model):
        if model.training:
            found["must_know_prompt"] = NO_PROMPT_IN_TRAINING
        elif arguments.get("use_cache") is False and found.get("labels") is None:
            found["must_know_prompt"] = NO_PROMPT_UNCACHED
    return found


def _names(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(model.forward).parameters


def _first(arguments: Mapping[str, Any], *names: str) -> Tensor | None:
    return next((arguments[name] for name in names if isinstance(arguments.get(name), Tensor)), None)


def batch_rows(arguments: Mapping[str, Any]) -> int | None:
    """Rows of a call's batch: of its tokens where it has some, else of its first tensor; None without a tensor."""
    found = _first(arguments, "input_ids", "inputs_embeds", "inputs", *arguments)
    return found.shape[0] if found is not None and found.ndim else None


def generation_prompt(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Tensor, int, torch.device]:
    """The prompt that ``generate`` was given.

    Args:
        model: a model that generates.
        args: the arguments of its ``generate``.
        kwargs: and those by name.

    Returns:
        The 2-D mask of the decoder's prompt (batch, length), the number of tokens already in a cache that was passed,
        and the prompt's device. Without a mask, transformers' own rule: padding is where the pad token stands, if the
        pad token is not also the end of a text.
    """
    tokens = args[0] if args and isinstance(args[0], Tensor) else _first(kwargs, "inputs_embeds", "input_ids", "inputs")
    parameter = next(model.parameters())
    if is_encoder_decoder(model):
        rows = tokens.shape[0] if tokens is not None else 1
        decoder = _first(kwargs, "decoder_input_ids", "decoder_inputs_embeds")
        mask = kwargs.get("decoder_attention_mask")
        if mask is None:
            length = 1 if decoder is None else decoder.shape[1]
            mask = torch.ones(rows, length, dtype=torch.bool, device=parameter.device)
        return mask != 0, cached_tokens(kwargs.get("past_key_values")), mask.device
    if tokens is None:
        tokens = torch.zeros(1, 1, dtype=torch.long, device=parameter.device)
    mask = kwargs.get("attention_mask")
    if mask is None:
        mask = _mask_from_padding(model, tokens, kwargs)
    return mask != 0, cached_tokens(kwargs.get("past_key_values")), tokens.device


def _mask_from_padding(model: nn.Module, tokens: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
    settings = [kwargs.get("generation_config"), getattr(model, "generation_config", None)]

    def setting(name: str) -> Any:
        values = [kwargs.get(name), *(getattr(config, name, None) for config in settings)]
        return next((value for value in values if value is not None), None)

    pad, eos = setting("pad_token_id"), setting("eos_token_id")
    ends = eos if isinstance(eos, (list, tuple)) else [eos]
    if tokens.ndim == 2 and pad is not None and pad not in ends:
        return tokens != pad
    return torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
