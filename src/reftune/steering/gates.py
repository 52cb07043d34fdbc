"""Where an edit should act: a probe between states of prompts where it should and states of those where it should not.

A gate looks at each token (`edits.GatedEdit`), so it is found on every token that the edit would change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float

from reftune.data.formats import Example, labelled_of, read_prompts
from reftune.data.reading import Source, read_rows
from reftune.edits import GatedEdit, RotatedEdit
from reftune.errors import ReftuneError
from reftune.steering.contrasts import wanted_class
from reftune.steering.directions import probe_normal

FEWEST = 6
"""Prompts of a side: two each to learn from, to choose the threshold on and to measure on."""
TokenStates = Float[np.ndarray, "_ width"]


@dataclass(frozen=True)
class Gate:
    """A probe of unit length, and the threshold beyond which the edit acts."""

    probe: Float[np.ndarray, " width"]
    threshold: float

    def is_open(self, states: TokenStates) -> Bool[np.ndarray, " _"]:
        """Which states lie beyond the threshold."""
        return np.asarray(states, np.float64) @ self.probe > self.threshold


def read_when(source: Source, acts: str | None = None) -> tuple[list[Example], list[Example]]:
    """Prompts where the edit should act, and prompts where it should not; some have a completion.

    Args:
        source: rows with `prompt` (or `text`) and `label`, optional `system` and `completion`.
        acts: the label of prompts where it should act; None: `1`, `true`, `positive` or `yes`.

    Raises:
        ReftuneError: naming file, row and field; fewer than six prompts of a side.
    """
    rows = read_rows(source)
    column = "prompt" if "prompt" in rows[0].values else "text"
    labels = [str(row.label) for row in labelled_of(rows, columns={"text": column})]
    acts = wanted_class(labels, acts, rows[0].source, "--when-label")
    answers = [row.values.get("completion") for row in rows]
    prompts = [
        replace(prompt, completion=answer) if isinstance(answer, str) else prompt
        for prompt, answer in zip(read_prompts(rows, columns={"prompt": column}), answers, strict=True)
    ]
    act = [prompt for prompt, label in zip(prompts, labels, strict=True) if label == acts]
    rest = [prompt for prompt, label in zip(prompts, labels, strict=True) if label != acts]
    if (fewest := min(len(act), len(rest))) < FEWEST:
        raise ReftuneError(
            f"{rows[0].source}: {fewest} prompts of a side; a gate needs at least {FEWEST} where the edit acts and as "
            "many where it does not, as some are held out."
        )
    return act, rest


def find_gate(act: TokenStates, rest: TokenStates, act_held: TokenStates, rest_held: TokenStates) -> Gate:
    """A logistic regression (L2, C = 1), and the threshold of highest balanced accuracy on held-out states.

    Of several such thresholds, that in the widest gap is taken.

    Args:
        act: states where the edit should act, to learn from.
        rest: states where it should not.
        act_held: others like the first, to choose the threshold on.
        rest_held: others like the second.

    Raises:
        ReftuneError: no probe tells the two apart, because their states are the same.
    """
    normal = probe_normal(np.asarray(act, np.float64), np.asarray(rest, np.float64))
    if not np.linalg.norm(normal) > 0:
        raise ReftuneError("when: the model has the same states on prompts where to act and where not; change them.")
    probe = normal / np.linalg.norm(normal)
    on, off = (np.sort(np.asarray(held, np.float64) @ probe) for held in (act_held, rest_held))
    values = np.unique(np.concatenate([on, off]))
    if len(values) == 1:
        return Gate(probe, float(values[0]))
    cuts, gaps = (values[1:] + values[:-1]) / 2, np.diff(values)
    shut = [np.searchsorted(side, cuts, side="right") / len(side) for side in (on, off)]
    right = np.round(1 - shut[0] + shut[1], 12)
    return Gate(probe, float(cuts[np.lexsort((gaps, right))[-1]]))


def balanced_accuracy(gate: Gate, act: TokenStates, rest: TokenStates) -> float:
    """The mean of two shares: of states where it should act, the open; of the others, the shut."""
    return float((gate.is_open(act).mean() + 1 - gate.is_open(rest).mean()) / 2)


def open_shares(gate: Gate, rows: Sequence[TokenStates]) -> tuple[float, float]:
    """Of rows, the share of tokens at which a gate is open, and of rows with any such token."""
    found = [gate.is_open(row) for row in rows]
    return float(np.concatenate(found).mean()), float(np.mean([one.any() for one in found]))


def gated_edit(edit: RotatedEdit, gate: Gate) -> GatedEdit:
    """An affine edit behind a gate; where that is open it is the same to the bit."""
    found = GatedEdit(edit.width, edit.r, init="paper")
    W, b, R = edit.factors(edit.rotation.dtype)
    with torch.no_grad():
        for own, value in ((found.weight, W), (found.bias, b), (found.rotation, R)):
            own.copy_(value)
        found.probe.copy_(torch.from_numpy(gate.probe))
        found.threshold.fill_(gate.threshold)
    found.retract_()
    return found.eval().requires_grad_(False)
