"""Small networks that are not transformers, for the tests of interventions by module path."""

import torch
from torch import Tensor, nn


class Mlp(nn.Module):
    """Blocks of a linear layer and a ReLU, then a linear layer: (batch, width) in, (batch, classes) out."""

    def __init__(self, width: int = 8, hidden: int = 16, layers: int = 3, classes: int = 2) -> None:
        super().__init__()
        sizes = [width, *[hidden] * layers]
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in zip(sizes, sizes[1:], strict=False)
        )
        self.head = nn.Linear(hidden, classes)

    def forward(self, inputs: Tensor) -> Tensor:
        for block in self.blocks:
            inputs = block(inputs)
        return self.head(inputs)


class Gru(nn.Module):
    """A GRU cell called once a time step: (batch, time, width) in, (batch, classes) out."""

    def __init__(self, width: int = 4, hidden: int = 6, classes: int = 3) -> None:
        super().__init__()
        self.cell = nn.GRUCell(width, hidden)
        self.head = nn.Linear(hidden, classes)

    def forward(self, inputs: Tensor) -> Tensor:
        state = torch.zeros(inputs.shape[0], self.cell.hidden_size)
        for step in inputs.unbind(1):
            state = self.cell(step, state)
        return self.head(state)
