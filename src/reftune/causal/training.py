"""Training of alignments: gradient descent on the network's answers after interchanges, the network itself frozen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from reftune.causal.aligned import Aligned, AlignedRuns, Cell
from reftune.causal.interchange_data import InterchangeData
from reftune.errors import ReftuneError


@dataclass(frozen=True)
class AlignOptions:
    """How alignments are trained.

    Attributes:
        epochs: passes through the data.
        batch_size: examples in a step.
        lr: of the rotation, with Adam; it falls to zero in a straight line.
        mask_lr: of boundaries and masks, likewise.
        penalty: weight of an alignment's ``penalty``.
        temperature: of boundaries and masks, at first and at last; it falls by a constant factor.
        seed: of the order of examples.
    """

    epochs: int = 10
    batch_size: int = 64
    lr: float = 1e-2
    mask_lr: float = 2e-2
    penalty: float = 0.1
    temperature: tuple[float, float] = (10.0, 0.1)
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "lr"):
            if getattr(self, name) <= 0:
                raise ReftuneError(f"{name}={getattr(self, name)}: must be greater than 0")
        if min(self.temperature) <= 0:
            raise ReftuneError(f"temperature={self.temperature}: must be greater than 0")


DEFAULT = AlignOptions()


@dataclass
class AlignHistory:
    """The mean loss of every epoch."""

    losses: list[float] = field(default_factory=list)


def align(
    model: nn.Module,
    aligned: Aligned | Cell,
    data: InterchangeData,
    options: AlignOptions = DEFAULT,
    choices: Sequence[int] | None = None,
) -> AlignHistory:
    """Train alignments that act together; **changes them**, and leaves the network as it is.

    Args:
        model: the network, in evaluation mode.
        aligned: one alignment at its location, or several.
        data: interchanges to learn from.
        options: how.
        choices: output classes (token ids) among which ``data.labels`` chooses; None: all.

    Raises:
        ReftuneError: a width that does not fit, or a variable without sources.
    """
    return align_cells(model, [[aligned] if isinstance(aligned, Aligned) else aligned], data, options, choices)[0]


def align_cells(
    model: nn.Module,
    cells: Sequence[Cell],
    data: InterchangeData,
    options: AlignOptions = DEFAULT,
    choices: Sequence[int] | None = None,
) -> list[AlignHistory]:
    """Train several cells of alignments side by side, each for itself: one forward serves them all.

    Args:
        model: the network, in evaluation mode.
        cells: alignments that act together, for each cell.
        data: interchanges to learn from.
        options: how.
        choices: as for ``align``.
    """
    members = [aligned.alignment for cell in cells for aligned in cell]
    if len({id(member) for member in members}) < len(members):
        raise ReftuneError("an alignment is in two cells: give each its own")
    groups = [
        {"params": [m.rotation for m in members if m.rotation is not None], "lr": options.lr},
        {"params": [p for m in members for p in m.mask_parameters()], "lr": options.mask_lr},
    ]
    optimizer = torch.optim.Adam([group for group in groups if group["params"]])
    histories = [AlignHistory() for _ in cells]
    with frozen(model):
        runs = AlignedRuns(model, cells, data, choices)
        generator = torch.Generator().manual_seed(options.seed)
        steps = options.epochs * max(1, -(-len(data) // options.batch_size))
        step = 0
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: 1 - done / steps)
        for member in members:
            member.train()
        for _ in range(options.epochs):
            totals = torch.zeros(len(cells))
            for index in torch.randperm(len(data), generator=generator).split(options.batch_size):
                first, last = options.temperature
                for member in members:
                    member.temperature = first * (last / first) ** (step / max(1, steps - 1))
                with torch.enable_grad():
                    logits = runs.logits(index)
                    labels = data.labels[index].to(logits.device).expand(len(cells), -1)
                    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
                    by_cell = losses.view(len(cells), -1).mean(-1)
                    loss = by_cell.sum() + options.penalty * sum(member.penalty().to(by_cell) for member in members)
                    optimizer.zero_grad()
                    loss.backward()
                optimizer.step()
                schedule.step()
                for member in members:
                    member.retract_()
                totals += by_cell.detach().cpu() * len(index)
                step += 1
            for history, total in zip(histories, totals.tolist(), strict=True):
                history.losses.append(total / len(data))
        for member in members:
            member.eval()
    return histories


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Within the block the model is in evaluation mode and none of its parameters wants a gradient; then as before."""
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        for parameter, _ in wanted:
            parameter.requires_grad = False
        yield
    finally:
        for parameter, required in wanted:
            parameter.requires_grad = required
        for module, training in modes:
            module.training = training
