"""Bases whose layers are spread over processes, as by ``from_pretrained(..., distributed_config=...)``.

Each process holds some rows or columns of a block's projections, and all of the residual stream. An edit of the stream
is therefore computed alike in each; where a tensor is in pieces (queries, results of heads, activations of the
feed-forward), it is put together, edited, and cut again, and autograd does the reverse.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from reftune.engine.blocks import inside
from reftune.engine.sites import Site
from reftune.errors import ReftuneError

_DIMENSION = "tp"
_WHOLE_OR_IN_RUNS = {
    "colwise", "colwise_rep", "colwise_gather_output", "rowwise", "rowwise_rep", "rowwise_split_input",
    "embedding_rowwise", "embedding_colwise",
}  # fmt: skip
"""Styles of transformers' plans that leave a module's input and output whole, or cut into one run a process."""


def parallel_mesh(module: nn.Module) -> DeviceMesh | None:
    """The processes over which tensor parallelism spreads a module's weights, or None."""
    for parameter in module.parameters():
        if isinstance(parameter, DTensor) and _DIMENSION in (parameter.device_mesh.mesh_dim_names or ()):
            return parameter.device_mesh[_DIMENSION]
    return None


def check_spread(model: nn.Module, site: Site) -> None:
    """Refuse a place where a process has something else than the tensor or a run of its channels.

    Raises:
        ReftuneError: such a place: terms of a sum, packed columns, a part of the sequence.
    """
    plan: dict[str, str] = (getattr(model, "tp_plan", None) or {}) if (getattr(model, "_tp_size", 1) or 1) > 1 else {}
    path = re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", site.module_path)
    for name, style in plan.items():
        if style == "sequence_parallel" or (inside(path, name) and style not in _WHOLE_OR_IN_RUNS):
            raise ReftuneError(
                f"component={site.component!r}: tensor parallelism keeps {name!r} as {style!r}, so that no process has "
                f"what passes the {site.side} of {site.module_path!r}. Edit the residual stream (block_output), or "
                "load the model without it."
            )


def edit_whole(edit: Callable[[Tensor], Tensor], block: nn.Module, channels: int, hidden: Tensor) -> Tensor:
    """Edit a hidden state, putting the processes' channels together before and cutting them again after.

    Args:
        edit: of a tensor (..., channels), the same in every process.
        block: holds the weights that are spread.
        channels: of the whole tensor; 0: not known.
        hidden: (..., channels), or this process's run of them.

    Returns:
        The edited tensor, of the same shape.

    Raises:
        ReftuneError: a module that is spread and whose width is not known.
    """
    if hidden.shape[-1] == channels or (mesh := parallel_mesh(block)) is None:
        return edit(hidden)
    if not channels:
        raise ReftuneError(
            "Under tensor parallelism an intervention needs a place whose width its type tells: name a component."
        )
    piece = -(-channels // mesh.size())
    if hidden.shape[-1] != len(range(channels)[mesh.get_local_rank() * piece :][:piece]):
        return edit(hidden)  # which refuses it
    shape = torch.Size((*hidden.shape[:-1], channels))
    stride = torch.empty(shape, device="meta").stride()
    pieces = DTensor.from_local(hidden, mesh, [Shard(hidden.ndim - 1)], run_check=False, shape=shape, stride=stride)
    edited = edit(pieces.redistribute(placements=[Replicate()]).to_local())
    whole = DTensor.from_local(edited, mesh, [Replicate()], run_check=False)
    return whole.redistribute(placements=[Shard(hidden.ndim - 1)]).to_local()


@torch.no_grad()
def share_tensors(edit: nn.Module, block: nn.Module) -> None:
    """**Give an edit the tensors** that it has in the first process that shares its block; each drew its own."""
    mesh = parallel_mesh(block)
    if mesh is None:
        return
    for tensor in (*edit.parameters(), *edit.buffers()):
        dist.broadcast(tensor, group=mesh.get_group(), group_src=0)
