"""Running some of a model's blocks: those before the first edit once, those after it in every step.

What stands between ``first`` and ``stop`` runs; every other block is stood in for by a ``KnownBlock`` for the length of
a ``with`` block. The list keeps its length and order, because models choose masks and cache layers by a block's index.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

KeysAndValues = tuple[Float[Tensor, "batch heads tokens dim"], Float[Tensor, "batch heads tokens dim"]]
"""What one layer's cache holds."""

_HOOK_TABLES = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)  # fmt: skip


class KnownBlock(nn.Module):
    """Stands in for a block whose output is known, or need not be.

    Args:
        block: the block it stands for, whose other attributes it answers with.
        output: the block's output; None passes the input on.
        with_hooks: whether the block's own hooks run on the output (so that an edit of it is applied).
        as_tuple: the length of the tuple that the block returns, 0 where it returns a tensor.
    """

    def __init__(self, block: nn.Module, output: Tensor | None, with_hooks: bool, as_tuple: int) -> None:
        super().__init__()
        self._block = (block,)
        self._output = output
        self._as_tuple = as_tuple
        if with_hooks:
            for table in _HOOK_TABLES:
                setattr(self, table, getattr(block, table))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_block"][0], name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The known output, in the form that the block returns it."""
        output = hidden_states if self._output is None else self._output
        return (output, *[None] * (self._as_tuple - 1)) if self._as_tuple else output


@contextmanager
def only_blocks(
    blocks: nn.ModuleList, first: int, stop: int, entering: Tensor | None, with_hooks: bool, as_tuple: int
) -> Iterator[None]:
    """Let only the blocks from ``first`` to before ``stop`` run; **changes the list, and always restores it**.

    Args:
        blocks: a stack's list.
        first: index of the first block that runs.
        stop: index of the block after the last one that runs.
        entering: the hidden state that enters block ``first``, (batch, sequence, hidden); None lets it come from below.
        with_hooks: whether the hooks of block ``first - 1`` run on ``entering``.
        as_tuple: as in ``KnownBlock``.
    """
    originals = dict(blocks._modules)
    try:
        for index, (name, block) in enumerate(originals.items()):
            assert block is not None
            if not first <= index < stop:
                last_known = index == first - 1
                known = entering if last_known else None
                blocks._modules[name] = KnownBlock(block, known, with_hooks and last_known, as_tuple)
        yield
    finally:
        blocks._modules.update(originals)


@contextmanager
def output_of(block: nn.Module) -> Iterator[list[Tensor]]:
    """Collect a block's hidden states while the context lasts; **installs a hook, and always removes it**."""
    found: list[Tensor] = []

    def collect(module: nn.Module, args: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, (tuple, list)) else output)

    handle = block.register_forward_hook(collect)
    try:
        yield found
    finally:
        handle.remove()


def build_cache(
    config: Any, prefix: Sequence[KeysAndValues], unread: Float[Tensor, "batch heads tokens dim"]
) -> DynamicCache | None:
    """A fresh cache that holds a prefix; a forward writes into it, so each forward takes its own.

    Args:
        config: the model's configuration, which says what kind of layer each is.
        prefix: keys and values of the topmost layers, those that run (there may be none).
        unread: what the layers below them get: they never run, but a model asks its first layer for the length.

    Returns:
        The cache, or None where the prefix has no tokens.
    """
    tokens = unread.shape[2]
    if tokens == 0:
        return None
    cache = DynamicCache(config=config)
    first = len(cache.layers) - len(prefix)
    for index, layer in enumerate(cache.layers):
        assert isinstance(layer, DynamicLayer)  # cache_obstacle refuses every other kind
        keys, values = prefix[index - first] if index >= first else (unread, unread)
        layer.lazy_initialization(keys, values)
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.cumulative_length = tokens
            keys, values = (x[..., max(0, tokens - layer.sliding_window + 1) :, :] for x in (keys, values))
        layer.keys, layer.values = keys, values
    return cache


class WholeCache(DynamicCache):
    """A cache whose sliding layers keep every token they are given, so that a prefix can be read from it whole."""

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        for layer in self.layers:
            if isinstance(layer, DynamicSlidingWindowLayer):
                layer.record_past = True


def right_padded(rows: list[Tensor], width: int | None = None) -> Tensor:
    """Stack rows (tokens, ...) of different lengths, zeros on the right: (batch, tokens, ...)."""
    width = max(len(row) for row in rows) if width is None else width
    padded = rows[0].new_zeros((len(rows), width, *rows[0].shape[1:]))
    for index, row in enumerate(rows):
        padded[index, : len(row)] = row
    return padded


def tail_positions(starts: Int[Tensor, " batch"], width: int) -> Int[Tensor, "batch width"]:
    """Explicit position ids of right-padded tails that begin at ``starts``."""
    return starts.unsqueeze(1) + torch.arange(width, device=starts.device)
