"""Activation functions by name, as transformers names them."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from reftune.errors import ReftuneError


def is_linear(act_fn: str | None) -> bool:
    """Whether the name stands for no activation at all."""
    return act_fn is None or act_fn == "linear"


def activation(act_fn: str | None) -> Callable[[Tensor], Tensor]:
    """The function that a name stands for.

    Args:
        act_fn: `None` or `"linear"` for none, else a key of transformers' `ACT2FN` such as `"relu"` or `"gelu"`.

    Raises:
        ReftuneError: an unknown name, or an activation with trainable parameters of its own.
    """
    if is_linear(act_fn):
        return _linear
    from transformers.activations import ACT2FN  # here, so that linear edits need nothing but torch

    if act_fn not in ACT2FN:
        raise ReftuneError(f"act_fn={act_fn!r}: unknown activation; known are {', '.join(sorted(ACT2FN))}")
    function = ACT2FN[act_fn]
    if isinstance(function, nn.Module) and next(function.parameters(), None) is not None:
        raise ReftuneError(f"act_fn={act_fn!r}: has parameters of its own, which an edit would not save; pick another")
    return function


def starts_at_zero(function: Callable[[Tensor], Tensor]) -> bool:
    """Whether a(0) = 0 and a'(0) != 0: an edit that feeds it zeros then changes nothing, and can still learn."""
    with torch.enable_grad():
        zero = torch.zeros(1, requires_grad=True)
        value = function(zero)
        (slope,) = torch.autograd.grad(value.sum(), zero)
    return value.item() == 0.0 and slope.item() != 0.0


def _linear(x: Tensor) -> Tensor:
    return x
