"""Layers below an intervention are not computed again: a run is recorded once, and later ones begin where they differ.

What a frozen network computes below the first changed layer is what it computed in the base run. ``Recording`` keeps
the outputs of the blocks; within ``resume`` the blocks below a layer return what was recorded. Their
``forward`` is shadowed and nothing else, so that hooks on them still fire and the model is as before on exit. Both
act on forwards of their own thread alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from reftune.causal.interchange import Run, call, intervene
from reftune.causal.session import Stop
from reftune.engine.sites import Site, Stack
from reftune.engine.stand_ins import OwnThread, StandIn

Pick = Callable[[Tensor], Tensor]


def first_computed(site: Site) -> int:
    """The number of blocks below which nothing changes when a site changes (0 where the site is in no stack)."""
    if site.stack is None or site.layer is None:
        if site.stack is None or site.block_path not in site.stack.block_paths:
            return 0
        layer = site.stack.block_paths.index(site.block_path)
    else:
        layer = site.layer
    return layer + int(site.module_path == site.block_path and site.side == "output")


class Recording:
    """The outputs of a stack's blocks in one run.

    Args:
        model: the model.
        what: the run, with its interventions.
        stack: whose blocks.
        layers: which blocks' outputs to keep; the run ends after the last of them.
    """

    def __init__(self, model: nn.Module, what: Run, stack: Stack, layers: Sequence[int]) -> None:
        self.model, self.stack = model, stack
        self.batch = batch_of(what)
        self._outputs: dict[int, Any] = {}
        wanted, thread = set(layers), OwnThread()
        if not wanted:
            return

        def keep(layer: int) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                if not thread.here:
                    return
                self._outputs[layer] = output
                if len(self._outputs) == len(wanted):
                    raise Stop

            return hook

        # The interventions' hooks come first, so that what is kept has them in it.
        with intervene(model, *what.interventions):
            blocks = [(layer, model.get_submodule(stack.block_paths[layer])) for layer in sorted(wanted)]
            handles = [block.register_forward_hook(keep(layer)) for layer, block in blocks]
            try:
                call(model, what.inputs)
            except Stop:
                pass
            finally:
                for handle in handles:
                    handle.remove()

    @classmethod
    def in_chunks(cls, model: nn.Module, what: Run, stack: Stack, layer: int, rows: int) -> Recording:
        """The output of one layer for a run of many rows without interventions, made of runs of ``rows`` rows."""
        batch = batch_of(what)
        whole = cls(model, what, stack, [])
        parts: list[Any] = []
        for start in range(0, batch, rows):
            chunk = slice(start, start + rows)
            part = Run(picked_inputs(what, lambda tensor, chunk=chunk: tensor[chunk]))
            parts.append((cls(model, part, stack, [layer])._outputs[layer], min(rows, batch - start)))
        whole._outputs[layer] = _joined(parts)
        return whole

    @contextmanager
    def resume(self, first: int, pick: Pick) -> Iterator[None]:
        """Within the block, compute only from block ``first`` on; **shadows the forward of the blocks below**.

        Args:
            first: whose predecessor's output must have been kept (0: compute everything).
            pick: makes of a tensor of the recorded batch one of the batch that now runs.
        """
        if first == 0:
            yield
            return
        recorded = self._outputs[first - 1]
        blocks = [self.model.get_submodule(path) for path in self.stack.block_paths[:first]]
        outputs = [*[recorded] * (first - 1), self._picked(recorded, pick)]
        replays = [_Replay(block, output) for block, output in zip(blocks, outputs, strict=True)]
        try:
            yield
        finally:
            for replay in replays:
                replay.remove()

    def _picked(self, output: Any, pick: Pick) -> Any:
        if isinstance(output, Tensor):
            return pick(output) if output.ndim and output.shape[0] == self.batch else output
        if isinstance(output, (tuple, list)):
            return type(output)(self._picked(part, pick) for part in output)
        return output


def _joined(parts: list[tuple[Any, int]]) -> Any:
    """One output of several chunks', given with their numbers of rows."""
    first, rows = parts[0]
    if isinstance(first, Tensor):
        return torch.cat([part for part, _ in parts]) if first.ndim and first.shape[0] == rows else first
    if isinstance(first, (tuple, list)):
        return type(first)(_joined([(part[i], n) for part, n in parts]) for i in range(len(first)))
    return first


class _Replay(StandIn):
    """Stands in for a block's ``forward``, which it does not run."""

    def __init__(self, block: nn.Module, output: Any) -> None:
        self.output, self.thread = output, OwnThread()
        super().__init__(block, "forward")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The recorded output."""
        return self.output if self.thread.here else self.original(*args, **kwargs)


def batch_of(what: Run) -> int:
    """The number of rows of a run's inputs."""
    if isinstance(what.inputs, Tensor):
        return what.inputs.shape[0]
    return next(value.shape[0] for value in what.inputs.values() if isinstance(value, Tensor) and value.ndim)


def picked_inputs(what: Run, pick: Pick) -> Any:
    """The inputs of a run with every tensor that has its rows replaced by ``pick`` of it."""
    batch = batch_of(what)
    if isinstance(what.inputs, Tensor):
        return pick(what.inputs)
    return {
        name: pick(value) if isinstance(value, Tensor) and value.ndim and value.shape[0] == batch else value
        for name, value in what.inputs.items()
    }
