"""Rotations where a distributed engine keeps the parameters that the optimiser steps.

An edit brings its rotation back to orthonormality at the start of a forward, in place. Under FSDP and DeepSpeed that
place is a copy, gathered or rounded for the forward: what the optimiser steps would drift, and the gradient, which is
that of an orthonormal rotation, would no longer be its own. So after each step the rotation is gathered, brought back,
and written where the engine keeps it: `r x width` numbers of each edit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn import functional

from reftune.edits.rotated import RotatedEdit
from reftune.edits.rotation import retract_


def sharded_by(model: nn.Module) -> str | None:
    """What keeps a model's parameters in pieces, or in copies of its own: a name to print, or None.

    Args:
        model: the model as the trainer calls it, in its wrapping.
    """
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        return "FSDP 1"
    if type(model).__name__ == "DeepSpeedEngine" or any(hasattr(p, "ds_id") for p in model.parameters()):
        return "DeepSpeed"
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        return "FSDP 2"
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return "a device mesh"
    return None


def retract_shards(model: nn.Module) -> None:
    """**Bring rotations back** where an engine keeps them, after an optimiser's step; every process must call it.

    Args:
        model: the model in its wrapping; a DeepSpeed engine's module will do.
    """
    wrappers = [module for module in model.modules() if isinstance(module, FullyShardedDataParallel)]
    for edit in _trained_rotations(model):
        if isinstance(edit.rotation, DTensor):
            edit.retract_()
        elif hasattr(edit.rotation, "ds_id") or hasattr(edit.rotation, "_hp_mapping"):
            _retract_masters(edit.rotation)
        elif wrappers:
            _retract_pieces(edit, wrappers[0].process_group)


def _trained_rotations(model: nn.Module) -> Iterator[RotatedEdit]:
    for module in model.modules():
        if isinstance(module, RotatedEdit) and module.parametrization == "cholesky" and module.rotation.requires_grad:
            yield module


@torch.no_grad()
def _retract_pieces(edit: RotatedEdit, group: Any) -> None:
    """FSDP 1: each process holds a run of the flattened rotation, in the order of ranks; some hold nothing of it."""
    if edit.rotation.ndim == 2:  # FSDP 1 in the mode that keeps parameters whole
        return
    piece, rank = edit.rotation.detach().flatten(), dist.get_rank(group)
    sizes = torch.zeros(dist.get_world_size(group), dtype=torch.long, device=piece.device)
    sizes[rank] = piece.numel()
    dist.all_reduce(sizes, group=group)
    begin = int(sizes[:rank].sum())
    whole = piece.new_zeros(int(sizes.sum()))
    whole[begin : begin + len(piece)] = piece
    dist.all_reduce(whole, group=group)
    retract_(whole.view(-1, edit.width))
    piece.copy_(whole[begin : begin + len(piece)])


@torch.no_grad()
def _retract_masters(rotation: Tensor) -> None:
    """DeepSpeed: the optimiser steps float32 pieces, and the forward has rounded copies, under ZeRO 3 in pieces too."""
    from deepspeed import zero  # pyright: ignore[reportMissingImports]
    from deepspeed.utils import (  # pyright: ignore[reportMissingImports]
        safe_get_full_fp32_param,
        safe_set_full_fp32_param,
        safe_set_local_fp32_param,
    )

    parameter: Any = rotation
    whole = safe_get_full_fp32_param(parameter)
    retract_(whole)
    if hasattr(parameter, "ds_id"):
        size, group = parameter.ds_tensor.numel(), parameter.ds_process_group
        padded = functional.pad(whole.flatten(), (0, size * dist.get_world_size(group) - whole.numel()))
        safe_set_local_fp32_param(parameter, padded.narrow(0, size * dist.get_rank(group), size))
    else:
        safe_set_full_fp32_param(parameter, whole)
    with zero.GatheredParameters([parameter], modifier_rank=0) if hasattr(parameter, "ds_id") else nullcontext():
        parameter.data.copy_(whole)
