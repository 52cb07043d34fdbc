"""The edits of the adapters in vLLM's slots, and which rows of a step each of them edits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from reftune.engine.positions import Part
from reftune.engine.row_plan import Run, Tokens, edited_ranges, edited_runs, row_slots
from reftune.errors import ReftuneError
from reftune.serving.bank import Stack
from reftune.serving.folded import FoldedAdapter
from reftune.serving.vllm.blocks import hook_dense, hook_planned
from reftune.serving.vllm.edit_op import PLANS, Work

NAME = "reftune"
"""Of the entry in vLLM's ``additional_config``."""


@dataclass(frozen=True)
class Settings:
    """What ``--additional-config '{"reftune": {...}}'`` may say.

    Attributes:
        form: ``"auto"``, ``"planned"`` or ``"dense"`` (see ``edit_op.py``).
        layers: of the dense form: the layers that can be edited; None: all.
        rank: of the dense form: the highest.
        untied: of the dense form: whether adapters may have an edit each for prefix and suffix.
    """

    form: str = "auto"
    layers: list[int] | None = None
    rank: int = 8
    untied: bool = True

    @classmethod
    def of(cls, additional_config: Any) -> Settings:
        """Read them.

        Raises:
            ReftuneError: an unknown setting.
        """
        given = additional_config.get(NAME, {}) if isinstance(additional_config, dict) else {}
        known = {name: value for name, value in given.items() if name in cls.__dataclass_fields__}
        if unknown := sorted(given.keys() - known.keys() - {"version"}):
            raise ReftuneError(
                f"additional_config: reftune.{unknown[0]} is no setting; there are form, layers, rank, untied."
            )
        settings = cls(**known)
        if settings.form not in ("auto", "planned", "dense"):
            raise ReftuneError(f"additional_config: reftune.form={settings.form!r}: give auto, planned or dense.")
        return settings


class Step(NamedTuple):
    """What a step computes, one number a request, in the order of the flat batch's rows."""

    ids: Sequence[int]
    computed: Sequence[int]
    scheduled: Sequence[int]
    prompt: Sequence[int]


class Slots(ABC):
    """The adapters that a step may use, by vLLM's slot."""

    def __init__(self) -> None:
        self._active: dict[int, tuple[int, FoldedAdapter]] = {}

    def put(self, number: int, slot: int, adapter: FoldedAdapter) -> None:
        """Write an adapter's edits where steps find them.

        Args:
            number: vLLM's id of it.
            slot: from 0.
            adapter: checked against the model.
        """
        self.drop(number)
        with torch.inference_mode(False):  # a step is in that mode and loading is not: both write to these tensors
            self.write(slot, adapter)
        self._active[number] = slot, adapter

    def drop(self, number: int) -> None:
        """Forget an adapter; nothing happens where it is not there."""
        if (found := self._active.pop(number, None)) is not None:
            with torch.inference_mode(False):
                self.erase(found[0])

    def plan(self, step: Step | None) -> None:
        """Lay out the next forward; None: nothing is edited."""
        batch = []
        for number, computed, scheduled, prompt in zip(*step, strict=True) if step is not None else ():
            slot, adapter = self._active.get(number, (0, None))
            ranges = () if adapter is None else edited_ranges(adapter.positions, prompt, adapter.untied)
            batch.append(Tokens(slot, ranges, computed, scheduled))
        self.lay_out(edited_runs(batch))

    @abstractmethod
    def write(self, slot: int, adapter: FoldedAdapter) -> None:
        """Store an adapter in a slot."""

    @abstractmethod
    def erase(self, slot: int) -> None:
        """Free a slot."""

    @abstractmethod
    def lay_out(self, runs: list[Run]) -> None:
        """Take the edited rows of the next forward; a run's ``adapter`` is its slot."""


class PlannedSlots(Slots):
    """The planned form: a stack a layer, as large as the adapters in use.

    Args:
        blocks: this process's blocks by number; **hooked**.
    """

    def __init__(self, blocks: dict[int, nn.Module]):
        super().__init__()
        self._stacks: dict[int, Stack] = {}
        self._rows: dict[int, list[tuple[int, Part, int]]] = {}
        self._plan: dict[int, Work] = {}
        self._blocks = blocks
        PLANS.append(self._plan)
        for layer, block in blocks.items():
            hook_planned(block, len(PLANS) - 1, layer)

    def write(self, slot: int, adapter: FoldedAdapter) -> None:
        """Store an adapter in a slot."""
        rows = self._rows[slot] = []
        for edit in adapter.edits:
            if edit.layer in self._blocks and edit.folded is not None:
                stack = self._stacks.setdefault(edit.layer, Stack(edit.width))
                rows.append((edit.layer, edit.part, stack.put(edit.folded)))

    def erase(self, slot: int) -> None:
        """Free a slot."""
        for layer, _, row in self._rows.pop(slot):
            self._stacks[layer].drop(row)

    def lay_out(self, runs: list[Run]) -> None:
        """Take the edited rows of the next forward."""
        self._plan.clear()
        for start, stop, slot, part in runs:
            for layer, half, row in self._rows[slot]:
                if half == part:
                    work = self._plan.setdefault(layer, Work(self._stacks[layer]))
                    work.runs.append((start, stop, row))


class DenseSlots(Slots):
    """The dense form: banks of a fixed size, written once an adapter enters a slot, and one slot number a row.

    Args:
        blocks: this process's blocks by number; **hooked**, as far as the settings say.
        settings: how much room there is.
        slots: vLLM's.
        width: of the hidden state.
        rows: of the largest forward.
        device: of the model.
    """

    def __init__(
        self, blocks: dict[int, nn.Module], settings: Settings, slots: int, width: int, rows: int, device: torch.device
    ):
        super().__init__()
        self._settings, self._halves = settings, 2 if settings.untied else 1
        self._rows = torch.zeros(rows, dtype=torch.int32, device=device)
        self._banks: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        count, r = slots * self._halves + 1, settings.rank
        for layer in blocks if settings.layers is None else [n for n in settings.layers if n in blocks]:
            shapes = (count, width, r), (count, r), (count, r, width)
            self._banks[layer] = tuple(torch.zeros(shape, device=device) for shape in shapes)  # type: ignore[assignment]
            hook_dense(blocks[layer], self._rows, self._banks[layer])

    def check(self, adapter: FoldedAdapter) -> None:
        """Refuse an adapter that has no room here.

        Raises:
            ReftuneError: says which setting gives it room.
        """
        rank = max(edit.folded.b.shape[0] for edit in adapter.edits if edit.folded is not None)
        layers = {edit.layer for edit in adapter.edits if edit.layer is not None}
        allowed = layers if self._settings.layers is None else self._settings.layers
        for wrong, name, least in (
            (rank > self._settings.rank, "rank", rank),
            (not layers <= set(allowed), "layers", sorted({*layers, *allowed})),
            (adapter.untied and not self._settings.untied, "untied", "true"),
        ):
            if wrong:
                raise ReftuneError(
                    f"{adapter.folder}: this server has no room for it: start vLLM with --additional-config "
                    f'\'{{"reftune": {{"{name}": {least}}}}}\', or serve the adapter from the start.'
                )

    def write(self, slot: int, adapter: FoldedAdapter) -> None:
        """Store an adapter in a slot."""
        self.erase(slot)
        for edit in adapter.edits:
            if edit.layer in self._banks and edit.folded is not None:
                row, r = self._row(slot, edit.part), edit.folded.b.shape[0]
                A, b, B = self._banks[edit.layer]
                A[row, :, :r], b[row, :r], B[row, :r] = edit.folded.A, edit.folded.b, edit.folded.B

    def erase(self, slot: int) -> None:
        """Free a slot: every layer reads the same slot of a row, so those that an adapter spares hold zeros."""
        first = self._row(slot, "both")
        for bank in self._banks.values():
            for tensor in bank:
                tensor[first : first + self._halves] = 0

    def lay_out(self, runs: list[Run]) -> None:
        """Take the edited rows of the next forward."""
        rows = torch.tensor(
            row_slots(runs, len(self._rows), lambda run: self._row(run.adapter, run.part)), dtype=torch.int32
        )
        if self._rows.device.type != "cpu":
            rows = rows.pin_memory()
        self._rows.copy_(rows, non_blocking=True)

    def _row(self, slot: int, part: Part) -> int:
        return 1 + slot * self._halves + (part == "suffix")
