"""Counterfactuals as tensors: what a network is run on, and what it should answer after the interchange."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from reftune.causal.counterfactuals import Counterfactual
from reftune.causal.interchange import Inputs, Run
from reftune.causal.model import Setting
from reftune.causal.reuse import picked_inputs
from reftune.errors import ReftuneError

Encode = Callable[[Sequence[Setting]], Inputs]


@dataclass(frozen=True, eq=False)
class InterchangeData:
    """Examples of interchanges for a network.

    Attributes:
        variables: what may be interchanged.
        base: inputs of the base runs.
        sources: inputs of each variable's source runs (where it is not interchanged, the base's).
        active: which variables an example interchanges.
        labels: the class that the network should then answer with.
    """

    variables: tuple[str, ...]
    base: Inputs
    sources: Mapping[str, Inputs]
    active: Bool[Tensor, "examples variables"]
    labels: Int[Tensor, " examples"]

    def __post_init__(self) -> None:
        if missing := set(self.variables) - set(self.sources):
            raise ReftuneError(f"no sources for the variables {sorted(missing)}")
        for name, inputs in [("base", self.base), *self.sources.items()]:
            tensors = [inputs] if isinstance(inputs, Tensor) else [v for v in inputs.values() if isinstance(v, Tensor)]
            if wrong := [len(t) for t in tensors if len(t) != len(self.labels)]:
                raise ReftuneError(f"{name}: {wrong[0]} rows of inputs, and {len(self.labels)} labels")
        if tuple(self.active.shape) != (len(self.labels), len(self.variables)):
            raise ReftuneError(f"active has shape {tuple(self.active.shape)}, expected (examples, variables)")

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, index: Tensor) -> InterchangeData:
        """The examples at these indices."""

        def pick(inputs: Inputs) -> Any:
            return picked_inputs(Run(inputs), lambda tensor: tensor[index])

        sources = {name: pick(inputs) for name, inputs in self.sources.items()}
        return replace(
            self, base=pick(self.base), sources=sources, active=self.active[index], labels=self.labels[index]
        )

    def with_random_labels(self, seed: int = 0) -> InterchangeData:
        """A control task: the same examples, labels shuffled, so that no alignment can be right about new ones."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return replace(self, labels=self.labels[order])


def encode_counterfactuals(
    examples: Sequence[Counterfactual],
    variables: Sequence[str],
    encode: Encode,
    label: Callable[[Setting], int],
) -> InterchangeData:
    """Turn counterfactuals into tensors.

    Args:
        examples: as ``counterfactuals`` draws them.
        variables: the variables that they may interchange.
        encode: inputs of the network for a list of the causal model's inputs.
        label: the class that a setting stands for.
    """
    names = tuple(variables)
    if unknown := {name for example in examples for name in example.sources} - set(names):
        raise ReftuneError(f"examples interchange {sorted(unknown)}, which is not among the variables {list(names)}")
    return InterchangeData(
        names,
        encode([example.base for example in examples]),
        {name: encode([example.sources.get(name, example.base) for example in examples]) for name in names},
        torch.tensor([[name in example.sources for name in names] for example in examples]),
        torch.tensor([label(example.setting) for example in examples]),
    )
