"""The MLP and the GRU of the comparison, with the parameter names that pyvene's own have."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.ff1 = nn.Linear(width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.ff1(hidden).relu()


class Blocks(nn.Module):
    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.h = nn.ModuleList(Block(width) for _ in range(layers))

    def forward(self, hidden: Tensor) -> Tensor:
        for block in self.h:
            hidden = block(hidden)
        return hidden


class Mlp(nn.Module):
    """(batch, 1, width) in, (batch, classes) out."""

    def __init__(self, width: int, layers: int, classes: int) -> None:
        super().__init__()
        self.mlp, self.score = Blocks(width, layers), nn.Linear(width, classes)

    def forward(self, inputs_embeds: Tensor) -> Tensor:
        return self.score(self.mlp(inputs_embeds)).squeeze(1)


class Cell(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.x2h, self.h2h = nn.Linear(width, 3 * width), nn.Linear(width, 3 * width)

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        (x_reset, x_update, x_new), (h_reset, h_update, h_new) = self.x2h(x).chunk(3, 1), self.h2h(state).chunk(3, 1)
        update = (x_update + h_update).sigmoid()
        return update * state + (1 - update) * (x_new + (x_reset + h_reset).sigmoid() * h_new).tanh()


class Cells(nn.Module):
    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.width, self.cells = width, nn.ModuleList(Cell(width) for _ in range(layers))

    def forward(self, inputs: Tensor) -> Tensor:
        states = [inputs.new_zeros(len(inputs), self.width) for _ in self.cells]
        for step in inputs.unbind(1):
            for layer, cell in enumerate(self.cells):
                states[layer] = step = cell(step, states[layer])
        return states[-1]


class Gru(nn.Module):
    """(batch, time, width) in, (batch, classes) out."""

    def __init__(self, width: int, layers: int, classes: int) -> None:
        super().__init__()
        self.gru, self.score = Cells(width, layers), nn.Linear(width, classes, bias=False)

    def forward(self, inputs_embeds: Tensor) -> Tensor:
        return self.score(self.gru(inputs_embeds))


def louder(model: nn.Module, factor: float) -> nn.Module:
    """**Multiplies every matrix**, so that a random model's answers depend on all of its layers."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(factor)
    return model
