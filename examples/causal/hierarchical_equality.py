"""Tutorial 1: how does a small network decide whether two pairs are alike in being equal?

An MLP learns (w = x) = (y = z) for random vectors. Two causal models would explain it: one computes both equalities and
compares them, one need not. Distributed alignment search looks for subspaces of each layer that carry the two equalities,
and interchange interventions test them: the state of one input's "left pair is equal" is put into the run on another.

    python examples/causal/hierarchical_equality.py [folder for pictures]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reftune.causal.accuracy import random_model
from reftune.causal.alignment import Das
from reftune.causal.counterfactuals import counterfactuals, factual
from reftune.causal.interchange_data import InterchangeData, encode_counterfactuals
from reftune.causal.model import Setting
from reftune.causal.models import hierarchical_equality
from reftune.causal.plots import plot_graph
from reftune.causal.search import SearchResult, search
from reftune.causal.training import AlignOptions

ENTITIES, SIZE, WIDTH, LAYERS = 2000, 4, 64, 3
NAMES = ["left", "right"]


class Network(nn.Module):
    """Three hidden layers; causal analysis needs nothing of a model but module paths."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [4 * SIZE, *[WIDTH] * LAYERS]
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in zip(sizes, sizes[1:], strict=False)
        )
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, pairs: Tensor) -> Tensor:
        for layer in self.layers:
            pairs = layer(pairs)
        return self.head(pairs)


def train_network(network: Network, inputs: Tensor, labels: Tensor, epochs: int = 20, batch: int = 1000) -> None:
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=epochs * (len(inputs) // batch))
    for _ in range(epochs):
        for index in torch.randperm(len(inputs)).split(batch):
            loss = F.cross_entropy(network(inputs[index]), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    network.eval()


def main(pictures: Path) -> dict[str, SearchResult]:
    torch.manual_seed(0)
    causal = hierarchical_equality(ENTITIES)
    table = torch.rand(ENTITIES, SIZE) * 2 - 1

    def encode(settings: Sequence[Setting]) -> Tensor:
        return table[torch.tensor([[setting[name] for name in "wxyz"] for setting in settings])].flatten(1)

    def label(setting: Setting) -> int:
        return int(setting["same"])

    # 1. The network learns the task.
    network = Network()
    settings = factual(causal, 120_000, seed=1)
    train_network(network, encode(settings), torch.tensor([label(setting) for setting in settings]))
    held_out = factual(causal, 2000, seed=2)
    with torch.no_grad():
        right = network(encode(held_out)).argmax(-1) == torch.tensor([label(setting) for setting in held_out])
    accuracy = float(right.float().mean())
    print(f"the network answers {accuracy:.3f} of new inputs rightly")
    assert accuracy >= 0.98

    # 2. Interchanges: what the causal model says when an equality is taken from another input.
    def interchanges(count: int, seed: int) -> InterchangeData:
        return encode_counterfactuals(counterfactuals(causal, count, NAMES, seed=seed), NAMES, encode, label)

    train, test = interchanges(16000, 3), interchanges(2000, 4)

    # 3. Subspaces for both equalities in every layer, in the network and in one that has learned nothing.
    options = AlignOptions(epochs=15, batch_size=128, lr=1e-2)
    found = {
        name: search(
            model, lambda width: Das({"left": width // 2, "right": width // 2}, width), train, test,
            component="layers.{layer}", labels=["both equalities"], options=options,
        )
        for name, model in (("trained network", network), ("control: shuffled weights", random_model(network)))
    }  # fmt: skip
    print(f"{'':28}{'layer':>6}{'IIA':>8}{'left':>8}{'right':>8}{'both':>8}")
    for name, result in found.items():
        for (layer, _), measured in result.accuracies.items():
            parts = [measured.by_variables[key] for key in ("left", "right", "left+right")]
            print(f"{name:28}{layer:6}{measured.overall:8.3f}" + "".join(f"{part:8.3f}" for part in parts))

    # 4. The result, checked.
    _, best = found["trained network"].best()
    _, control = found["control: shuffled weights"].best()
    assert min(best.by_variables.values()) >= 0.95, best
    assert control.overall <= 0.6, control
    print(f"both equalities are found: IIA {best.overall:.3f} at best; the control reaches {control.overall:.3f}")

    found["trained network"].heat_map.plot(pictures / "hierarchical_equality_iia.png")
    example = causal.run({"w": 1, "x": 1, "y": 2, "z": 3})
    plot_graph(causal, pictures / "hierarchical_equality_graph.png", example)
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "pictures"))
