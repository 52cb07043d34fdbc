"""The custom operations that a hooked block calls: opaque to torch.compile, so that a graph keeps them as they are.

A vLLM block returns ``(hidden, residual)``, whose sum is the hidden state, or the hidden state alone. It is read in
float32 and the change is added to ``hidden``, in place: the next norm sees the edited state, and the residual stream
carries it on.

- **dense**: a slot for every row, banks at fixed addresses, fixed shapes, no Python state: CUDA graphs can capture it.
- **planned**: the rows of the step, decided in Python; nothing at all where nothing is edited. For CPUs without graphs.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import torch
from torch import Tensor

from reftune.serving.bank import Stack

_FEW_ROWS = 4
"""Up to so many rows a run, one batched product over gathered factors is faster than a product a run."""


@dataclass
class Work:
    """What one layer edits in one step of the planned form.

    Attributes:
        stack: the layer's edits.
        runs: (first row, row after the last, row of the stack).
    """

    stack: Stack
    runs: list[tuple[int, int, int]] = field(default_factory=list)

    @property
    def scattered(self) -> bool:
        """Whether gathering rows is better than a product a run."""
        rows = sum(stop - start for start, stop, _ in self.runs)
        return len(self.runs) > 1 and rows <= _FEW_ROWS * len(self.runs)


PLANS: list[dict[int, Work]] = []
"""The step's work by layer, one plan an engine of this process: a graph names its plan by number."""


def edit_planned(hidden: Tensor, residual: Tensor | None, plan: int, layer: int) -> None:
    """Edit the rows that the plan names; **changes** ``hidden``, (rows, width)."""
    work = PLANS[plan].get(layer)
    if work is None:
        return
    A, b, B = work.stack.at(hidden.device)
    if work.scattered:
        index = [row for start, stop, _ in work.runs for row in range(start, stop)]
        of = [edit for start, stop, edit in work.runs for _ in range(start, stop)]
        rows, edits = torch.tensor([index, of], device=hidden.device)
        change = torch.bmm(
            torch.bmm(_state(hidden, residual, rows).unsqueeze(1), A[edits]) + b[edits].unsqueeze(1), B[edits]
        )
        hidden[rows] = (hidden[rows].float() + change.squeeze(1)).to(hidden.dtype)
        return
    for start, stop, edit in work.runs:
        rows = slice(start, stop)
        change = torch.addmm(b[edit], _state(hidden, residual, rows), A[edit]).mm(B[edit])
        hidden[rows] = (hidden[rows].float() + change).to(hidden.dtype)


def edit_dense(hidden: Tensor, residual: Tensor | None, slots: Tensor, A: Tensor, b: Tensor, B: Tensor) -> None:
    """Edit row t by the edit in slot ``slots[t]``, slot 0 not at all; **changes** ``hidden``.

    Args:
        hidden: (rows, width).
        residual: likewise, or None.
        slots: (at least rows,).
        A: (slots, width, r), float32.
        b: (slots, r).
        B: (slots, r, width).
    """
    if hidden.device.type != "cpu" or os.environ.get("TRITON_INTERPRET") == "1":
        from reftune.serving.vllm.kernel import edit_rows

        return edit_rows(hidden, residual, slots, A, b, B)
    rows = slots[: hidden.shape[0]].nonzero().squeeze(-1)
    if len(rows):
        of = slots[rows]
        change = torch.bmm(torch.bmm(_state(hidden, residual, rows).unsqueeze(1), A[of]) + b[of].unsqueeze(1), B[of])
        hidden[rows] = (hidden[rows].float() + change.squeeze(1)).to(hidden.dtype)


def _state(hidden: Tensor, residual: Tensor | None, rows: Tensor | slice) -> Tensor:
    return hidden[rows].float() if residual is None else hidden[rows].float() + residual[rows].float()


planned = torch.library.custom_op(
    "reftune::edit_planned", edit_planned, mutates_args=("hidden",),
    schema="(Tensor(a!) hidden, Tensor? residual, int plan, int layer) -> ()",
)  # fmt: skip
dense = torch.library.custom_op(
    "reftune::edit_dense", edit_dense, mutates_args=("hidden",),
    schema="(Tensor(a!) hidden, Tensor? residual, Tensor slots, Tensor A, Tensor b, Tensor B) -> ()",
)  # fmt: skip
for _op in (planned, dense):
    _op.register_fake(lambda *args: None)
