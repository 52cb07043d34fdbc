"""A sweep's trials as its table, pictures and page take them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from reftune.sweeps.space import Label


@dataclass(frozen=True)
class TrialRecord:
    """One trained trial.

    Attributes:
        number: in the study, from 0.
        state: `complete`, `pruned` or `failed`.
        value: held-out loss, nats per completion token: of the best epoch; of the last one where it was pruned.
        epochs: held-out loss after each epoch.
        settings: value of each searched field, as it is written in tables.
        seconds: training and evaluation.
        facts: trainable_parameters, prefix_hits, prefix_misses.
        note: why it failed.
    """

    number: int
    state: str
    value: float | None
    epochs: list[float]
    settings: dict[str, Label]
    seconds: float | None
    facts: dict[str, Any] = field(default_factory=dict)
    note: str = ""


def trial_records(study: Any) -> list[TrialRecord]:
    """A study's trials in order."""
    found = []
    for trial in study.trials():
        facts = dict(trial.user_attrs)
        epochs = [float(loss) for _, loss in sorted(trial.intermediate_values.items())]
        state = {"COMPLETE": "complete", "PRUNED": "pruned"}.get(trial.state.name, "failed")
        value = trial.value if state == "complete" else epochs[-1] if epochs and state == "pruned" else None
        seconds, note = facts.pop("seconds", None), facts.pop("error", "")
        settings = {name: trial.params[name] for name in study.space if name in trial.params}
        found.append(TrialRecord(trial.number, state, value, epochs, settings, seconds, facts, note))
    return found
