"""The decoder blocks of a vLLM model, found by structure, and the hook on each."""
# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from reftune.errors import ReftuneError


def decoder_blocks(model: nn.Module, layers: int, is_attention: Callable[[nn.Module], bool]) -> dict[int, nn.Module]:
    """The blocks of a model that this process holds, by number.

    Args:
        model: as vLLM built it; a pipeline stage holds some blocks, and placeholders for the others.
        layers: how many there are in the whole model.
        is_attention: whether a module is one that vLLM keeps a cache for.

    Raises:
        ReftuneError: no list of blocks, or several.
    """
    lists = {path: module for path, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    inner = [path for path in lists if any(path.startswith(f"{outer}.") for outer in lists)]
    stacks = [
        module for path, module in lists.items() if path not in inner and any(is_attention(m) for m in module.modules())
    ]
    if len(stacks) != 1 or len(stacks[0]) != layers:
        found = [len(stack) for stack in stacks]
        raise ReftuneError(
            f"{type(model).__name__}: expected one list of {layers} decoder blocks, found lists of {found}: where ReFT "
            "edits belong in this model is not known. Serve it with reftune serve --engine embedded."
        )
    return {
        number: block for number, block in enumerate(stacks[0]) if type(block).__name__ != "PPMissingLayer"
    }  # fmt: skip


def split(output: Any) -> tuple[Tensor, Tensor | None]:
    """The two terms of the hidden state that a block returned, of which the second may be missing.

    Raises:
        ReftuneError: some other output.
    """
    if isinstance(output, Tensor):
        return output, None
    if isinstance(output, tuple) and len(output) == 2 and isinstance(output[0], Tensor):
        hidden, residual = output
        if residual is None or (isinstance(residual, Tensor) and residual.shape == hidden.shape):
            return hidden, residual
    raise ReftuneError(
        f"A block of this model returns {type(output).__name__}, not a hidden state: it cannot be edited."
    )


def hook_planned(block: nn.Module, plan: int, layer: int) -> None:
    """Let a block be edited in the planned form; **changes the block**."""
    from reftune.serving.vllm.edit_op import planned

    def edit(module: nn.Module, args: Any, output: Any) -> None:
        hidden, residual = split(output)
        planned(hidden, residual, plan, layer)

    block.register_forward_hook(edit)


def hook_dense(block: nn.Module, slots: Tensor, factors: tuple[Tensor, Tensor, Tensor]) -> None:
    """Let a block be edited in the dense form; **changes the block**.

    The tensors become its buffers: a compiled graph takes them as inputs, a captured one by address.
    """
    from reftune.serving.vllm.edit_op import dense

    for name, tensor in zip(("slots", "A", "b", "B"), (slots, *factors), strict=True):
        block.register_buffer(f"reftune_{name}", tensor, persistent=False)

    def edit(module: Any, args: Any, output: Any) -> None:
        hidden, residual = split(output)
        dense(hidden, residual, module.reftune_slots, module.reftune_A, module.reftune_b, module.reftune_B)

    block.register_forward_hook(edit)
