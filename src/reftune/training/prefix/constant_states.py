"""What an edit leaves alone of a row: its prefix's keys and values, and the states that enter the first edited layer.

Computed once with the base model, without gradients, and kept in a store; read from there in every later step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from reftune.engine.hooks import Engine
from reftune.training.prefix.base_identity import base_identity
from reftune.training.prefix.partial_forward import WholeCache, only_blocks, output_of, right_padded
from reftune.training.prefix.row_groups import length_groups, one_more_forward
from reftune.training.prefix.store import PrefixStore


class PrefixReuseOff(Exception):
    """Prefix reuse is not exact or not useful here; the message says why."""


@dataclass(frozen=True)
class Row:
    """One example of a batch.

    Attributes:
        ids: its tokens up to the last one that predicts something.
        prompt_length: tokens of the prompt.
        targets: what each of those tokens is to predict, -100 for nothing.
        begin: where its tail begins, at its first edited token or its last prompt token.
        directions: the directions of the edit that act on it; None: all.
    """

    ids: Tensor
    prompt_length: int
    targets: Tensor
    begin: int
    directions: Tensor | None = None

    def prefix_key(self) -> bytes:
        """The store's key of what comes before its first edited token."""
        return b"p" + self.ids[: self.begin].numpy().tobytes()

    def tail_key(self) -> bytes:
        """The store's key of the rest."""
        return b"t%d:" % self.begin + self.ids.numpy().tobytes()


class ConstantStates:
    """Computes and keeps what is constant.

    Args:
        model: a causal language model under an engine.
        engine: its engine, whose edits are paused while the base model runs.
        owner: the module that owns the blocks.
        blocks: its blocks.
        first: index of the first block that training changes.
        store: where results are kept.
        others_use_it: whether other trainings use the store too, of whose models the keys must tell this one apart.
        alone: compute each row by itself, so that its bits do not depend on the rows beside it.

    Attributes:
        shared: what all rows begin with and no edit touches.
        root: keys and values of those tokens, (layers, 2, 1, heads, tokens, dim), once computed.
        as_tuple: the length of the tuple that a block returns, 0 where it returns a tensor.
    """

    def __init__(
        self,
        model: Any,
        engine: Engine,
        owner: Any,
        blocks: Any,
        first: int,
        store: PrefixStore,
        others_use_it: bool,
        alone: bool,
    ) -> None:
        self.model, self.engine, self.owner, self.blocks, self.first = model, engine, owner, blocks, first
        self.store, self.alone = store, alone
        self.shared = torch.empty(0, dtype=torch.long)
        self.root: Tensor | None = None
        self.as_tuple = 0
        self._identity = base_identity(model) if others_use_it else b""

    def _scope(self, device: torch.device) -> bytes:
        """What decides the stored tensors besides a row's tokens and its first edited one."""
        autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        return self._identity + f"{self.first}/{len(self.shared)}/{device.type}/{autocast}/".encode()

    def of_rows(self, rows: list[Row], device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
        """Each row's prefix, (layers, 2, heads, tokens after the shared ones, dim), and tail, (tokens, hidden)."""
        scope = self._scope(device)
        self._compute_root(device)  # also where another training stored everything else
        found = [(self.store.get(scope + row.prefix_key()), self.store.get(scope + row.tail_key())) for row in rows]
        missing = [i for i, (prefix, tail) in enumerate(found) if prefix is None or (tail is None and self.first > 0)]
        for group in self._together(missing, [len(rows[i].ids) for i in missing], device):
            for index, (kv, hidden) in zip(group, self._compute([rows[i] for i in group], device), strict=True):
                prefix, tail = found[index] = {"kv": kv}, {"hidden": hidden}
                self.store.put(scope + rows[index].prefix_key(), prefix)
                self.store.put(scope + rows[index].tail_key(), tail)
        prefixes = [prefix["kv"] for prefix, _ in found if prefix is not None]
        return prefixes, [tail["hidden"] if tail is not None else torch.empty(0) for _, tail in found]

    def _together(self, missing: list[int], lengths: list[int], device: torch.device) -> list[list[int]]:
        """Which rows are computed in one forward: by length, or each alone where its bits must not depend on others."""
        if self.alone or not missing:
            return [[index] for index in missing]
        cost = one_more_forward(self.model, device)
        return [[missing[i] for i in group] for group in length_groups(lengths, cost)]

    @torch.no_grad()
    def _compute(self, rows: list[Row], device: torch.device) -> list[tuple[Tensor, Tensor]]:
        """Run the base model on rows together: all tokens below the first edited layer, the prefixes alone above.

        Rows are padded on the right, where causal attention never sees it.
        """
        shared, count = self._compute_root(device), len(self.blocks)
        ids = right_padded([row.ids[shared:] for row in rows]).to(device)
        longest = max(row.begin for row in rows) - shared
        arriving = None
        with self._base_alone():
            if self.first > 0:
                with output_of(self.blocks[self.first - 1]) as outputs:
                    self._run(ids, shared, 0, self.first, None)
                arriving = outputs[0]
            cache = None
            if longest > 0 and self.first < count:
                entering = None if arriving is None else arriving[:, :longest]
                cache = self._run(ids[:, :longest], shared, self.first, count, entering)
        found = []
        for index, row in enumerate(rows):
            tokens = slice(shared, row.begin)
            kv = self._no_layers(row.begin - shared, device)
            if cache is not None and row.begin > shared:
                kv = self._stacked(cache, self.first, tokens, index)
            hidden = torch.empty(0)
            if arriving is not None:
                hidden = arriving[index, row.begin - shared : len(row.ids) - shared]
            found.append((kv, hidden))
        return found

    def _run(self, ids: Tensor, start: int, first: int, stop: int, entering: Tensor | None) -> WholeCache:
        """Run some of the blocks on tokens (batch, tokens) that follow the shared ones; the cache that they filled."""
        cache = WholeCache(self.model.config)
        if self.root is not None:
            for layer, (keys, values) in zip(cache.layers, self.root, strict=True):
                assert isinstance(layer, DynamicLayer)  # cache_obstacle refuses every other kind
                layer.update(*(x.expand(len(ids), -1, -1, -1) for x in (keys, values)))
        inputs = {"input_ids": ids} if entering is None else {"inputs_embeds": entering}
        positions = torch.arange(start, start + ids.shape[1], device=ids.device).expand(len(ids), -1)
        with only_blocks(self.blocks, first, stop, entering, False, self.as_tuple):
            self.owner(**inputs, position_ids=positions, past_key_values=cache, use_cache=True)
        return cache

    @staticmethod
    def _stacked(cache: Any, first: int, tokens: slice, row: int = 0) -> Tensor:
        """Keys and values of one row's tokens in the layers from ``first`` on, (layers, 2, heads, tokens, dim)."""
        layers = [(layer.keys[row, :, tokens], layer.values[row, :, tokens]) for layer in cache.layers[first:]]
        if len({x.shape for pair in layers for x in pair}) != 1:
            raise PrefixReuseOff("its layers have keys and values of different shapes")
        return torch.stack([torch.stack(pair) for pair in layers])

    def _compute_root(self, device: torch.device) -> int:
        """Compute the tokens that every example begins with, once; their number."""
        if len(self.shared) and self.root is None:
            cache = WholeCache(self.model.config)
            with torch.no_grad(), self._base_alone():
                self.owner(input_ids=self.shared.unsqueeze(0).to(device), past_key_values=cache, use_cache=True)
            self.root = self._stacked(cache, 0, slice(0, None)).unsqueeze(2)
        return len(self.shared)

    def _no_layers(self, tokens: int, device: torch.device) -> Tensor:
        """Keys and values where no layer needs any, or no token precedes the first edited one."""
        like = self.no_keys(1, tokens, device)
        return like.new_empty(len(self.blocks) - self.first, 2, *like.shape[1:])

    def no_keys(self, batch: int, tokens: int, device: torch.device) -> Tensor:
        """Keys of a layer that nobody reads: (batch, heads, tokens, dim), of one number's memory."""
        text = self.model.config.get_text_config()
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return torch.zeros(1, device=device, dtype=self.model.dtype).expand(batch, heads, tokens, dim)

    @contextmanager
    def _base_alone(self) -> Iterator[None]:
        """The base model without its edits (without dropout it is the same in training and evaluation)."""
        found = list(self.engine.interventions.values())
        before = [set(intervention.paused) for intervention in found]
        try:
            for intervention in found:
                intervention.paused |= set(intervention.placements)
            yield
        finally:
            for intervention, paused in zip(found, before, strict=True):
                intervention.paused = paused
