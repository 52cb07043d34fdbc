"""The methods of the comparison: PEFT's own configurations, as its experiments have them, and edits of every token.

PEFT's rates belong to 5,000 steps. A short run has another schedule: every rate of PEFT's is `SHORT` times as large, for
all methods alike, and searched for none. Edits take reftune's default rate in both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from peft import IA3Config, LoraConfig, PeftConfig, RoadConfig, VeraConfig

from reftune import ReftConfig
from reftune.runs.known_settings import learning_rate

RANKS = (1, 8, 32, 4)
SHORT = 30


@dataclass(frozen=True)
class Experiment:
    """One method at one rank.

    Attributes:
        name: `method/model-rank8`, as PEFT names its experiments.
        config: makes the adapter's configuration.
        optimizer_kwargs: of AdamW in 5,000 steps; None: reftune's default rate, without decay.
    """

    name: str
    config: Callable[[], PeftConfig]
    optimizer_kwargs: dict[str, float] | None

    def optimiser(self, base: Any, tokens: float, short: bool) -> dict[str, float]:
        """AdamW's arguments for a base model and so many tokens a step."""
        if self.optimizer_kwargs is None:
            shape, edit = base.config.get_text_config(), self.config()
            assert isinstance(edit, ReftConfig)
            rate = learning_rate(shape.hidden_size, edit.r, shape.num_hidden_layers, tokens)
            return {"lr": rate, "weight_decay": 0.0}
        scale = SHORT if short else 1
        return {**self.optimizer_kwargs, "lr": self.optimizer_kwargs["lr"] * scale}


def experiments(model: str) -> list[Experiment]:
    """Every experiment on a model of this name."""

    def edit(method: str, rank: int) -> Callable[[], PeftConfig]:
        return lambda: ReftConfig(method=method, r=rank, layers_to_transform="all", positions="all")

    def lora(rank: int) -> Callable[[], PeftConfig]:
        return lambda: LoraConfig(r=rank, lora_alpha=2 * rank, task_type="CAUSAL_LM")

    def vera(rank: int) -> Callable[[], PeftConfig]:
        return lambda: VeraConfig(r=rank, d_initial=0.1)

    short = model.rpartition("/")[2]
    found = [
        Experiment(f"ia3/{short}-lr_0.001", IA3Config, {"lr": 1e-3}),
        Experiment(f"road/{short}-lr_0.001", lambda: RoadConfig(variant="road_2", group_size=64), {"lr": 1e-3}),
    ]
    for rank in RANKS:
        found += [
            Experiment(f"lora/{short}-rank{rank}", lora(rank), {"lr": 1e-4, "weight_decay": 0.1}),
            Experiment(f"direft/{short}-all-rank{rank}", edit("direft", rank), None),
            Experiment(f"loreft/{short}-all-rank{rank}", edit("loreft", rank), None),
            Experiment(f"vera/{short}-rank{rank}", vera(rank), {"lr": 1e-3}),
        ]
    return found
