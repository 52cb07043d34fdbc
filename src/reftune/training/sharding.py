"""Rotations where a distributed wrapper keeps the parameters that the optimiser steps.

An edit brings its rotation back to orthonormality at the start of a forward, in place. Under FSDP that place is a copy,
gathered for the forward and thrown away after it: the shards, which the optimiser steps, would drift, and the gradient,
which is that of an orthonormal rotation, would no longer be theirs.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from reftune.edits.rotated import RotatedEdit
from reftune.errors import ReftuneError


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


def _trained_rotations(model: nn.Module) -> Iterator[RotatedEdit]:
    for module in model.modules():
        if isinstance(module, RotatedEdit) and module.parametrization == "cholesky" and module.rotation.requires_grad:
            yield module


def refuse_lost_retractions(model: nn.Module) -> None:
    """Refuse to train a rotation where bringing it back would not reach what the optimiser steps.

    Args:
        model: the model as the trainer calls it, in its wrapping.

    Raises:
        ReftuneError: a trained rotation under FSDP 1 or DeepSpeed.
    """
    sharding = sharded_by(model)
    if sharding in ("FSDP 1", "DeepSpeed") and any(True for _ in _trained_rotations(model)):
        raise ReftuneError(
            f"{sharding} keeps copies of the parameters that an edit cannot bring back to orthonormality after a step. "
            "Use DistributedDataParallel (no option at all: the base model is frozen and needs no optimiser state) or "
            "fsdp_version 2; or a method without a rotation, 'direft' or 'noreft'."
        )


def retract_shards(model: nn.Module) -> None:
    """**Bring sharded rotations back** after an optimiser's step; every process must call it."""
    for edit in _trained_rotations(model):
        if isinstance(edit.rotation, DTensor):
            edit.retract_()
