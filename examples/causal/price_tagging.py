"""Tutorial 3: a transformer learns where a price lies: below, inside or above a bracket. Which comparisons does it make?

Boundless DAS searches every layer and token for two subspaces, of learned size, one for "the amount reaches the lower
bound" and one for "it does not exceed the upper bound". The table is IIA by layer.

    python examples/causal/price_tagging.py [folder for pictures]
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from price_network import ANSWERS, TOKENS, answers, encode, label, price_model, trained_network

from reftune.causal.accuracy import random_model
from reftune.causal.alignment import BoundlessDas
from reftune.causal.counterfactuals import counterfactuals, factual
from reftune.causal.interchange_data import InterchangeData, encode_counterfactuals
from reftune.causal.plots import plot_graph
from reftune.causal.search import SearchResult, search
from reftune.causal.training import AlignOptions

NAMES = ["enough", "affordable"]


def main(pictures: Path) -> SearchResult:
    causal = price_model()
    network = trained_network(causal)
    held_out = factual(causal, 2000, seed=2)
    accuracy = float((answers(network, held_out) == torch.tensor([label(s) for s in held_out])).float().mean())
    print(f"the transformer answers {accuracy:.3f} of new brackets rightly")
    assert accuracy >= 0.97

    def interchanges(count: int, seed: int) -> InterchangeData:
        return encode_counterfactuals(counterfactuals(causal, count, NAMES, seed=seed), NAMES, encode, label)

    train, test = interchanges(3000, 3), interchanges(1000, 4)
    options = AlignOptions(epochs=8, batch_size=128, lr=1e-2, penalty=1.0, temperature=(5.0, 0.2))

    def look_in(model: torch.nn.Module, positions: list[int]) -> SearchResult:
        return search(
            model, lambda width: BoundlessDas(NAMES, width), train, test, positions=positions,
            labels=[TOKENS[p] for p in positions], options=options, choices=ANSWERS,
        )  # fmt: skip

    found, control = look_in(network, [2, 3]), look_in(random_model(network), [3])
    print(f"{'layer':>5}{'IIA':>8}  at        enough  affordable   directions      control")
    for row, layer in enumerate(found.heat_map.rows):
        column = found.heat_map.columns[int(found.heat_map.values[row].argmax())]
        key = int(layer), column
        measured, alignment = found.accuracies[key], found.aligned[key].alignment
        assert isinstance(alignment, BoundlessDas)
        parts = "".join(f"{measured.by_variables[name]:10.3f}" for name in NAMES)
        sizes = ", ".join(f"{name} {size}" for name, size in alignment.directions().items())
        print(
            f"{layer:>5}{measured.overall:8.3f}  {column:8}{parts}   {sizes}  {float(control.heat_map.values[row, 0]):.3f}"
        )
    _, best = found.best()
    assert min(best.by_variables.values()) >= 0.95, best
    assert control.best()[1].overall <= 0.6, control.best()
    found.heat_map.plot(pictures / "price_tagging_iia.png")
    plot_graph(causal, pictures / "price_tagging_graph.png", causal.run({"low": 20, "high": 70, "amount": 50}))
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "pictures"))
