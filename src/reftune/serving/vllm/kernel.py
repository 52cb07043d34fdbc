"""The Triton kernel of the dense form: one program a row, which returns at once where nothing is edited."""
# pyright: reportMissingImports=false, reportMissingModuleSource=false

from __future__ import annotations

from typing import Any, no_type_check

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 128


@triton.jit
@no_type_check
def _edit_row(
    hidden, residual, slots, A, b, B, hidden_stride, residual_stride,
    WIDTH: tl.constexpr, RANK: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, PAIR: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row).to(tl.int64)
    if slot == 0:
        return
    k = tl.arange(0, PADDED)
    real = k < RANK
    x = tl.load(b + slot * RANK + k, mask=real, other=0.0)
    for start in range(0, WIDTH, BLOCK):
        d = start + tl.arange(0, BLOCK)
        inside = d < WIDTH
        h = tl.load(hidden + row * hidden_stride + d, mask=inside, other=0.0).to(tl.float32)
        if PAIR:
            h += tl.load(residual + row * residual_stride + d, mask=inside, other=0.0).to(tl.float32)
        mask = inside[:, None] & real[None, :]
        a = tl.load(A + slot * WIDTH * RANK + d[:, None] * RANK + k[None, :], mask=mask, other=0.0)
        x += tl.sum(h[:, None] * a, axis=0)
    for start in range(0, WIDTH, BLOCK):
        d = start + tl.arange(0, BLOCK)
        inside = d < WIDTH
        mask = real[:, None] & inside[None, :]
        w = tl.load(B + slot * RANK * WIDTH + k[:, None] * WIDTH + d[None, :], mask=mask, other=0.0)
        h = tl.load(hidden + row * hidden_stride + d, mask=inside, other=0.0)
        changed = h.to(tl.float32) + tl.sum(x[:, None] * w, axis=0)
        tl.store(hidden + row * hidden_stride + d, changed.to(h.dtype), mask=inside)


def edit_rows(hidden: Tensor, residual: Tensor | None, slots: Tensor, A: Tensor, b: Tensor, B: Tensor) -> None:
    """As ``edit_op.edit_dense``; **changes** ``hidden``. Rows may have strides, channels must be side by side."""
    pair = residual is not None
    other: Any = residual if pair else hidden
    rank = b.shape[1]
    _edit_row[(hidden.shape[0],)](  # pyright: ignore[reportIndexIssue]
        hidden, other, slots, A, b, B, hidden.stride(0), other.stride(0),
        WIDTH=hidden.shape[1], RANK=rank, PADDED=triton.next_power_of_2(rank), BLOCK=_BLOCK, PAIR=pair,
    )  # fmt: skip
