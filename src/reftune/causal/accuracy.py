"""Interchange intervention accuracy, and the controls without which it says little."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from reftune.causal.aligned import Aligned, AlignedRuns, Cell
from reftune.causal.interchange_data import InterchangeData
from reftune.causal.training import frozen


@dataclass(frozen=True)
class InterchangeAccuracy:
    """How often the network answers as the causal model does after an interchange.

    Attributes:
        overall: over all examples.
        by_variables: for each set of variables interchanged together, written ``"left"`` or ``"left+right"``.
        majority: the share of the most frequent label: what a constant answer would reach.
    """

    overall: float
    by_variables: dict[str, float]
    majority: float


@torch.no_grad()
def interchange_accuracies(
    model: nn.Module,
    cells: Sequence[Cell],
    data: InterchangeData,
    choices: Sequence[int] | None = None,
    batch_size: int = 64,
) -> list[InterchangeAccuracy]:
    """The accuracy of each of several cells of alignments, side by side (see ``align_cells``)."""
    with frozen(model):
        members = [aligned.alignment for cell in cells for aligned in cell]
        modes = [member.training for member in members]
        for member in members:
            member.eval()
        runs = AlignedRuns(model, cells, data, choices)
        found = [runs.logits(index).argmax(-1).cpu() for index in torch.arange(len(data)).split(batch_size)]
        for member, mode in zip(members, modes, strict=True):
            member.train(mode)
    right = torch.cat(found, 1) == data.labels.cpu()
    sets = ["+".join(n for n, on in zip(data.variables, row, strict=True) if on) for row in data.active.tolist()]
    majority = float(torch.bincount(data.labels.cpu()).max()) / len(data)
    result = []
    for answers in right.float():
        by_variables = {
            name: float(answers[torch.tensor([s == name for s in sets])].mean()) for name in sorted(set(sets))
        }
        result.append(InterchangeAccuracy(float(answers.mean()), by_variables, majority))
    return result


def interchange_accuracy(
    model: nn.Module,
    aligned: Aligned | Cell,
    data: InterchangeData,
    choices: Sequence[int] | None = None,
    batch_size: int = 64,
) -> InterchangeAccuracy:
    """Share of interchanges after which the network answers with the causal model's label (IIA).

    Args:
        model: the network.
        aligned: one alignment at its location, or several that act together. They are used as evaluation uses them.
        data: interchanges that were not trained on.
        choices: output classes (token ids) among which ``data.labels`` chooses; None: all.
        batch_size: examples in a forward.
    """
    cell = [aligned] if isinstance(aligned, Aligned) else aligned
    return interchange_accuracies(model, [cell], data, choices, batch_size)[0]


@torch.no_grad()
def random_model(model: nn.Module, seed: int = 0) -> nn.Module:
    """A control model: a copy whose parameters each have their own entries shuffled, so that it has learned nothing."""
    control = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    for parameter in control.parameters():
        order = torch.randperm(parameter.numel(), generator=generator).to(parameter.device)
        parameter.copy_(parameter.flatten()[order].view_as(parameter))
    return control
