"""Prefix reuse: what an edit leaves alone is computed once.

Attention is causal and the model is frozen. Tokens before the first edited one have the same keys, values and hidden
states in every step of every epoch, and below the first edited layer all tokens do. So per example there is stored,
computed once without gradients:

- the keys and values of the tokens before the first edited one, in the layers from the first edited one up;
- the hidden states of the remaining tokens (the *tail*) where they enter that layer.

A step then puts the prefixes side by side (padded on the left, so that they all end where the tails begin), runs only
the tails, only from the first edited layer up, with explicit position ids, and the head only at supervised positions.
A tail ends at the last token that is to predict something: what follows it changes no loss.
Where an edit reads the output of a block, that block itself is constant too and its stored output is edited.

Tokens that every example begins with (a system prompt, a template) are computed and stored once for all. Where edits
lie in them (``f7+l7``, ``prompt``, ``all``), they are the same edits of the same states in every row, so that a step
runs them once for the whole batch, with gradients, before the rows' own tokens. Exact or off: ``obstacle`` names what
makes it inexact, and the first batch's logits are compared with the plain path's besides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from reftune.engine.hooks import Engine
from reftune.engine.position_grammar import Positions
from reftune.training.loss import IGNORED_LABEL
from reftune.training.prefix.base_identity import base_identity
from reftune.training.prefix.constant_states import ConstantStates, PrefixReuseOff, Row
from reftune.training.prefix.obstacles import obstacle, sharding_obstacle
from reftune.training.prefix.partial_forward import (
    KeysAndValues,
    WholeCache,
    build_cache,
    only_blocks,
    right_padded,
    tail_positions,
)
from reftune.training.prefix.row_groups import PLAIN_INPUTS, length_groups, one_more_forward
from reftune.training.prefix.shared_beginning import first_in_tail, shared_beginning
from reftune.training.prefix.store import PrefixStore
from reftune.training.supervised_logits import plain_model, shifted, supervised_forward

WORTH_IT = 0.1
"""Without a constant prefix, the share of a step's work from which on it is saved."""


_PROVEN: dict[tuple[Any, ...], int] = {}
"""For what this process has seen the plain path's logits come out again, and how many values a block returned."""

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")

ENOUGH_ROWS = 1000
"""Rows from which a row's mean length is told."""


class OtherBatch(Exception):
    """This one batch cannot be reduced (its rows do not begin as the training rows do); others can."""


@dataclass(frozen=True)
class Reduced:
    """Rows of a batch without what is constant of them.

    Attributes:
        members: which rows of the batch.
        inputs: the model's arguments and the ``shift_labels`` of the tails.
        blocks, first, entering, as_tuple: as ``only_blocks`` takes them.
    """

    members: list[int]
    inputs: dict[str, Any]
    blocks: Any
    first: int
    entering: Tensor | None
    as_tuple: int

    @contextmanager
    def running(self) -> Iterator[dict[str, Any]]:
        """The arguments of a forward, which must run inside the ``with`` block; backward may run after it."""
        with only_blocks(self.blocks, self.first, len(self.blocks), self.entering, True, self.as_tuple):
            yield self.inputs


class PrefixReuse:
    """Turns a batch into the part of it that training changes.

    Args:
        model: a causal language model with ReFT adapters, in any wrapping.
        store: where results are kept.
        others_use_it: whether other trainings use the store too, of whose models the keys must tell this one apart.
        alone: compute what is constant of each row by itself, so that its bits do not depend on the rows beside it.

    Raises:
        PrefixReuseOff: something here makes it inexact or useless.
    """

    def __init__(self, model: nn.Module, store: PrefixStore, others_use_it: bool = False, alone: bool = False) -> None:
        self.model: Any = plain_model(model)
        engine = Engine.of(self.model)
        if engine is None or not engine.active_positions():
            raise PrefixReuseOff("no ReFT adapter is active")
        self.engine = engine
        if (reason := sharding_obstacle(model) or obstacle(self.model, engine)) is not None:
            raise PrefixReuseOff(reason)
        placements = [
            found.placements[name] for found in engine.interventions.values() for name in found.active_names()
        ]
        self.positions: list[Positions] = list(engine.active_positions().values())
        stack = placements[0].site.stack
        assert stack is not None
        self.owner: Any = self.model.get_submodule(stack.owner_path)
        self.blocks: Any = self.model.get_submodule(stack.module_path)
        lowest = min(p.site.layer for p in placements if p.site.layer is not None)
        at_lowest = [p.site for p in placements if p.site.layer == lowest]
        outputs_only = all(s.side == "output" and s.module_path == s.block_path for s in at_lowest)
        self.first = lowest + 1 if outputs_only else lowest
        self.constant = ConstantStates(
            self.model, engine, self.owner, self.blocks, self.first, store, others_use_it, alone
        )
        self._edited_at: set[int] = set()
        self._checked = False
        self._edited = torch.empty(0, dtype=torch.long)  # what all rows begin with, edited alike in each

    def share_beginning_of(self, rows: Callable[[], Iterator[Mapping[str, Any]]]) -> None:
        """Compute the tokens that all examples begin with once: for good, or once a step where edits lie in them.

        Args:
            rows: gives the examples from the first on, each time it is called.

        Raises:
            PrefixReuseOff: nothing worth having is constant or shared.
        """
        if self.has_prefix:
            self.constant.shared = shared_beginning(rows(), self.positions)
            return
        first = next(rows(), None)
        if first is not None and not self._drops_out():  # each row draws its own dropout
            self._edited = shared_beginning(rows(), self.positions, edited=True)
        if len(self._edited):
            assert first is not None
            self._edited_at = self._edits_in(len(self._edited), int(first["prompt_length"]), len(first["input_ids"]))
        lengths = [len(row["input_ids"]) for row in islice(rows(), ENOUGH_ROWS)] if len(self._edited) else []
        shared = len(self._edited) * len(lengths) / max(1, sum(lengths))
        below = self.first / len(self.blocks)
        if 1 - (1 - below) * (1 - shared) < WORTH_IT:
            raise PrefixReuseOff(
                f"positions {', '.join(p.text for p in self.positions)} edit from the first token on, only "
                f"{self.first} of {len(self.blocks)} layers lie below the first edit, and the rows begin with only "
                f"{len(self._edited)} tokens in common"
            )

    def _drops_out(self) -> bool:
        edits = [edit for name in self.engine.active_positions() for edit in self.engine.edits(name).values()]
        return any(getattr(edit, "dropout", 0.0) for edit in edits)

    @property
    def has_prefix(self) -> bool:
        """Whether the positions leave the prompt's beginning alone."""
        return all(p.spares_beginning for p in self.positions)

    # A step

    def prepare(self, model: nn.Module, inputs: Mapping[str, Any]) -> list[Reduced]:
        """Reduce a batch to its tails; what is constant of it is taken from the store, or computed and stored.

        Args:
            model: the model as the trainer calls it.
            inputs: input_ids, attention_mask, labels and prompt_lengths of a padded batch.

        Returns:
            The reduced batch, in groups of rows of similar length: together of the same loss and gradients.

        Raises:
            PrefixReuseOff: batches of another kind, or logits that did not come out the same.
            OtherBatch: rows that do not begin with the shared tokens.
        """
        rows = self._rows(inputs)
        device = inputs["input_ids"].device
        if not self._checked:
            self._prove(model, inputs, rows)
        return self._reduce(rows, device, one_more_forward(self.model, device))

    def _rows(self, inputs: Mapping[str, Any]) -> list[Row]:
        unknown = set(inputs) - PLAIN_INPUTS
        if unknown or "prompt_lengths" not in inputs or "input_ids" not in inputs:
            raise PrefixReuseOff(f"batches carry {sorted(unknown) or 'no prompt_lengths'}")
        directions = inputs.get("intervention_directions")
        if not isinstance(directions, (Tensor, type(None))):
            raise PrefixReuseOff("batches carry intervention_directions by adapter")
        ids, targets = inputs["input_ids"].cpu(), shifted(inputs["labels"]).cpu()
        lengths = inputs["prompt_lengths"].tolist()
        if len(lengths) != len(ids):
            raise PrefixReuseOff("rows are packed")
        mask = inputs.get("attention_mask")
        attended = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.cpu() != 0
        if not bool(attended[:, 0].all()):
            raise PrefixReuseOff("rows are padded on the left, where the plain path counts padding as positions")
        rows = []
        for row, length in enumerate(lengths):
            own = ids[row][attended[row]]
            begin = first_in_tail(self.positions, length, len(own))
            if begin < len(self.constant.shared) or not self._begins_alike(own, length):
                raise OtherBatch
            predicts = targets[row][attended[row]]
            learned = (predicts != IGNORED_LABEL).nonzero()
            end = max(begin + 1, int(learned[-1]) + 1 if len(learned) else 0)
            acting = None if directions is None else directions[row]
            rows.append(Row(own[:end], length, predicts[:end], begin, acting))
        return rows

    def _begins_alike(self, ids: Tensor, prompt_length: int) -> bool:
        """Whether a row begins with the shared tokens, edited as in the others."""
        if not torch.equal(ids[: len(self.constant.shared)], self.constant.shared):
            return False
        edited = len(self._edited)
        if not edited:
            return True
        if prompt_length <= edited or not torch.equal(ids[:edited], self._edited):
            return False
        return self._edits_in(edited, prompt_length, len(ids)) == self._edited_at

    def _edits_in(self, tokens: int, prompt_length: int, total: int) -> set[int]:
        """The edited ones of a row's first tokens."""
        return {o for p in self.positions for o in p.ordinals(prompt_length, total) if o < tokens}

    def _reduce(self, rows: list[Row], device: torch.device, forward_cost: int | None) -> list[Reduced]:
        prefixes, tails = self.constant.of_rows(rows, device)
        edited, layers, variant = len(self._edited), [], torch.empty(0, dtype=torch.long)
        if edited:
            layers, variant = self._run_edited(rows, tails[0][:edited], device)
            rows = [replace(row, begin=edited) for row in rows]
            tails = [tail[edited:] for tail in tails]
        found = []
        for group in length_groups([len(row.ids) - row.begin for row in rows], forward_cost):
            if edited:
                prefix = [(_of_rows(keys, variant[group]), _of_rows(values, variant[group])) for keys, values in layers]
                mask = torch.ones(len(group), edited, dtype=torch.bool, device=device)
            else:
                prefix, mask = self._side_by_side([prefixes[i] for i in group], device)
            found.append(self._assemble(group, [rows[i] for i in group], prefix, mask, [tails[i] for i in group]))
        return found

    def _assemble(
        self,
        members: list[int],
        rows: list[Row],
        prefix: list[KeysAndValues],
        prefix_mask: Tensor,
        tails: list[Tensor],
    ) -> Reduced:
        device = prefix_mask.device
        cache = build_cache(self.model.config, prefix, self.constant.no_keys(len(rows), prefix_mask.shape[1], device))
        begins = torch.tensor([row.begin for row in rows], device=device)
        lengths = [len(row.ids) - row.begin for row in rows]
        width = max(lengths)
        tail_mask = torch.arange(width) < torch.tensor(lengths).unsqueeze(1)
        targets = right_padded([row.targets[row.begin :] for row in rows])
        inputs: dict[str, Any] = {
            "attention_mask": torch.cat([prefix_mask, tail_mask.to(device)], dim=1).long(),
            "position_ids": tail_positions(begins, width),
            "prompt_lengths": torch.tensor([row.prompt_length for row in rows], device=device),
            "shift_labels": targets.masked_fill(~tail_mask, IGNORED_LABEL).to(device),
            "past_key_values": cache,
            "use_cache": cache is not None,
            "intervention_directions": _stacked_directions(rows, device),
        }
        entering = None
        if self.first == 0:
            inputs["input_ids"] = right_padded([row.ids[row.begin :] for row in rows]).to(device)
        else:
            entering = right_padded(tails).to(device)
            inputs["inputs_embeds"] = entering.new_zeros(1).expand_as(entering)
        return Reduced(members, inputs, self.blocks, self.first, entering, self.constant.as_tuple)

    def _run_edited(
        self, rows: list[Row], entering: Tensor, device: torch.device
    ) -> tuple[list[KeysAndValues], Tensor]:
        """Keys and values of the shared and edited tokens, with gradients: once for all rows that are edited alike.

        Returns:
            The layers' keys and values, one variant beside another; and of each row, which variant is its.
        """
        cache = WholeCache(self.model.config)
        directions, variant = _stacked_directions(rows, device), torch.zeros(len(rows), dtype=torch.long, device=device)
        if directions is not None:
            directions, variant = directions.unique(dim=0, return_inverse=True)
        count = 1 if directions is None else len(directions)
        states = None
        if self.first == 0:
            inputs = {"input_ids": self._edited.to(device).expand(count, -1)}
        else:
            states = entering.to(device).expand(count, -1, -1)
            inputs = {"inputs_embeds": states.new_zeros(1).expand_as(states)}
        positions = torch.arange(len(self._edited), device=device).expand(count, -1)
        lengths = torch.full((count,), rows[0].prompt_length, device=device)
        with only_blocks(self.blocks, self.first, len(self.blocks), states, True, self.constant.as_tuple):
            self.owner(
                **inputs, position_ids=positions, past_key_values=cache, use_cache=True, prompt_lengths=lengths,
                intervention_directions=directions,
            )  # fmt: skip
        layers: list[Any] = cache.layers[self.first :]
        return [(layer.keys, layer.values) for layer in layers], variant

    def _side_by_side(self, prefixes: list[Tensor], device: torch.device) -> tuple[list[KeysAndValues], Tensor]:
        """Prefixes (layers, 2, heads, tokens, dim), the shared tokens before each, left-padded; and their mask."""
        shared = len(self.constant.shared)
        longest = max(shared + prefix.shape[3] for prefix in prefixes)
        mask = torch.zeros(len(prefixes), longest, dtype=torch.bool, device=device)
        layers, _, heads, _, dim = prefixes[0].shape
        together = torch.zeros(layers, 2, len(prefixes), heads, longest, dim, dtype=prefixes[0].dtype, device=device)
        for row, prefix in enumerate(prefixes):
            start = longest - prefix.shape[3]
            together[:, :, row, :, start:] = prefix.to(device)
            if self.constant.root is not None:
                together[:, :, row, :, start - shared : start] = self.constant.root[self.first :, :, 0]
            mask[row, start - shared :] = True
        return [(keys, values) for keys, values in together], mask

    # Proof

    def _prove(self, model: nn.Module, inputs: Mapping[str, Any], rows: list[Row]) -> None:
        """``_check``, once a process for the same base, edits and code."""
        case = self._case(inputs["input_ids"].device)
        if case is not None and case in _PROVEN:
            self.constant.as_tuple = _PROVEN[case]
            # As the check would: what is computed beside what decides the bits of a training.
            self.constant.of_rows([rows[row] for row in _shortest(rows)], inputs["input_ids"].device)
            self._checked = True
            return
        self._check(model, inputs, rows)
        if case is not None:
            _PROVEN[case] = self.constant.as_tuple

    def _case(self, device: torch.device) -> tuple[Any, ...] | None:
        """Everything on which the proof depends; None where something runs in a forward that cannot be compared."""
        code: list[Any] = [ALL_ATTENTION_FUNCTIONS.get(self.model.config._attn_implementation)]
        for name, module in self.model.named_modules():
            hooks = [hook for table in _HOOKS for hook in getattr(module, table).values()]
            if not all(
                map(_is_ours, [*hooks, *([module.__dict__["forward"]] if "forward" in module.__dict__ else [])])
            ):
                return None
            code.append((name, type(module), type(module).forward))
        edits = [
            (path, part, str(placement.site), placement.positions.text, placement.scale, repr(edit))
            for path, found in self.engine.interventions.items()
            for adapter in found.active_names()
            for placement in [found.placements[adapter]]
            for part, edit in found.parts(adapter)
        ]
        autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        shared = bool(len(self._edited)), bool(len(self.constant.shared))
        return base_identity(self.model), *code, *edits, device.type, autocast, self.first, *shared

    @torch.no_grad()
    def _check(self, model: nn.Module, inputs: Mapping[str, Any], rows: list[Row]) -> None:
        """Compare two rows' logits with the plain path's, once; learn on the way how the blocks return their output."""
        if isinstance(model, DistributedDataParallel):  # not every process need check at the same step, nor at all
            model = model.module
        chosen = _shortest(rows)
        width = int(inputs["attention_mask"][chosen].sum(1).max()) if "attention_mask" in inputs else None
        of_tokens = PLAIN_INPUTS - {"prompt_lengths", "intervention_directions"}
        few = {name: value[chosen, :width] if name in of_tokens else value[chosen] for name, value in inputs.items()}
        forms: list[int] = []
        handles = [
            block.register_forward_hook(
                lambda module, args, output: forms.append(len(output) if isinstance(output, (tuple, list)) else 0)
            )
            for block in self.blocks
        ]
        modes = [(module, module.training) for module in model.modules()]
        model.eval()  # for the edits' own dropout
        try:
            plain = supervised_forward(model, few)
            for handle in handles:
                handle.remove()
            if len(set(forms)) != 1:
                raise PrefixReuseOff("its blocks return their output in different forms")
            self.constant.as_tuple = forms[0]
            device = inputs["input_ids"].device
            (whole,) = self._reduce([rows[row] for row in chosen], device, None)
            with whole.running() as reduced:
                again = supervised_forward(model, reduced)
        finally:
            for handle in handles:
                handle.remove()
            for module, mode in modes:
                module.training = mode
        if plain.logits.numel():
            half = plain.logits.dtype in (torch.float16, torch.bfloat16)
            rounding = 16 * torch.finfo(plain.logits.dtype).eps if half else 200 * torch.finfo(torch.float32).eps
            tolerance = rounding * float(plain.logits.abs().max().clamp(min=1))
            difference = float((plain.logits - again.logits).abs().max())
            if not torch.equal(plain.targets, again.targets) or not difference <= tolerance:
                raise PrefixReuseOff(
                    f"its logits differ from the plain path's by {difference:.1e} on the first batch "
                    f"(allowed: {tolerance:.1e})"
                )
        self._checked = True


def _stacked_directions(rows: list[Row], device: torch.device) -> Tensor | None:
    found = [row.directions for row in rows if row.directions is not None]
    return torch.stack(found).to(device) if found else None


def _shortest(rows: list[Row]) -> list[int]:
    """The two that cost the least to check."""
    return sorted(range(len(rows)), key=lambda row: len(rows[row].ids))[:2]


def _is_ours(run: Any) -> bool:
    """Whether what runs in a forward is the engine's own."""
    run = getattr(run, "func", run)
    return (getattr(run, "__module__", None) or type(run).__module__).startswith("reftune.engine.")


def _of_rows(variants: Tensor, chosen: Tensor) -> Tensor:
    """Each row's variant; a single one without a copy."""
    return variants[chosen] if len(variants) > 1 else variants.expand(len(chosen), -1, -1, -1)
