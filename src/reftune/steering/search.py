"""What `reftune steer` looks for: directions at every layer, and the layers and strength at which they work best."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from datasets import Dataset
from rich.progress import Progress

from reftune.adapter.config import ReftConfig, new_adapter
from reftune.data.formats import Example
from reftune.data.tokenising import REJECTED, Encoded, Encoding
from reftune.engine.position_grammar import parse_positions
from reftune.engine.sites import Site
from reftune.evaluation.row_losses import row_losses
from reftune.steering.contrasts import Contrasts, Row, split
from reftune.steering.directions import Direction, find_directions, gap_in_deviations, separation
from reftune.steering.gates import Gate, gated_edit
from reftune.steering.settings import SteerSettings
from reftune.steering.states import mean_states
from reftune.steering.strength import edit_of, steered
from reftune.training.arguments import ReftTrainingArguments
from reftune.training.objectives import Forward
from reftune.training.supervised_logits import supervised_forward
from reftune.training.trainer import ReftTrainer

_CANDIDATES = 4
_STRENGTHS = (0.5, 1.0, 2.0)
_TRIED = 6
"""Held-out rows of each side on which layers and strengths are tried."""


@dataclass(frozen=True)
class Base:
    """The base model and how it reads rows."""

    model: Any
    tokenizer: Any
    encoding: Encoding
    batch_size: int

    @property
    def pad(self) -> int:
        """The token that fills up rows."""
        return int(self.tokenizer.pad_token_id)

    def rows(self, rows: Sequence[Row]) -> list[Encoded]:
        """Rows as tokens."""
        return self.encoding.dataset(rows).to_list()  # type: ignore[arg-type, return-value]

    def prompts(self, rows: Sequence[Example]) -> list[Encoded]:
        """Rows of which some have no completion."""
        return [
            self.rows([row])[0] if row.completion.strip()
            else {"input_ids": (ids := self.encoding.generation_prompt(row)), "labels": [], "prompt_length": len(ids)}
            for row in rows
        ]  # fmt: skip

    def loss(self, rows: Sequence[Encoded], forward: Forward = supervised_forward) -> float:
        """Mean loss of a completion token, in nats."""
        return row_losses(self.model, rows, self.pad, self.batch_size, forward).per_token


@dataclass(frozen=True)
class _Sides:
    """Tokenised rows of the positive and the negative side, and which of them are held out."""

    rows: tuple[list[Encoded], list[Encoded]]
    splits: Sequence[list[list[int]]]

    def held_out(self) -> tuple[list[Encoded], list[Encoded]]:
        """Held-out rows of each side on which layers and strengths are tried."""
        first, second = (
            [rows[i] for i in held][:_TRIED] for rows, (_, held) in zip(self.rows, self.splits, strict=True)
        )
        return first, second


def _directions(
    base: Base, sites: list[Site], sides: _Sides, paired: bool, settings: SteerSettings, progress: Progress
) -> tuple[dict[Site, Direction], list[dict[str, float]]]:
    """The directions at every layer, and how well each tells the held-out rows apart."""
    positions, rows = parse_positions(settings.positions), [*sides.rows[0], *sides.rows[1]]
    task = progress.add_task("Reading hidden states", total=len(rows))
    found: dict[Site, Direction] = {}
    told: list[dict[str, float]] = []
    with mean_states(
        base.model, rows, sites, positions, base.pad, base.batch_size, partial(progress.advance, task)
    ) as states:
        halves = states[: len(sides.rows[0])], states[len(sides.rows[0]) :]
        for place, site in enumerate(sites):
            (learnt, held), (others, others_held) = (
                (half[learn, place], half[hold, place])
                for half, (learn, hold) in zip(halves, sides.splits, strict=True)
            )
            found[site] = find_directions(
                learnt, others, estimator=settings.estimator, rank=settings.rank, paired=paired
            )
            one = {"layer": float(site.layer or 0), "separation": separation(held, others_held, found[site])}
            told.append(one | {"deviations": gap_in_deviations(held, others_held, found[site])})
    return found, told


def _choose(
    base: Base,
    directions: dict[Site, Direction],
    told: list[dict[str, float]],
    sides: _Sides,
    measured: bool,
    settings: SteerSettings,
    progress: Progress,
) -> tuple[list[Site], float, list[dict[str, float]]]:
    """The layers and the strength under which the side that is wanted is likeliest, and every loss on the way."""
    sign = -1.0 if (settings.scale or 1.0) < 0 else 1.0
    groups = [list(directions)]
    if settings.layers == "auto":
        groups = [
            [site] for _, site in _apart(sorted(zip(told, directions, strict=True), key=lambda i: -i[0]["deviations"]))
        ]
    if not measured:  # whole texts have no answers whose likelihood could choose
        return groups[0], settings.scale or sign, []
    wanted = sides.held_out()[1 if settings.remove or sign < 0 else 0]
    strengths = (settings.scale,) if settings.scale is not None else (1.0,) if settings.remove else _STRENGTHS
    tried: list[dict[str, float]] = []
    taken = groups[0], strengths[0]
    task = progress.add_task("Trying layers and strengths", total=len(groups))
    for group in groups:
        last = math.inf
        some = {site: directions[site] for site in group}
        with steered(base.model, some, settings.positions, remove=settings.remove, rows=wanted) as on:
            for strength in strengths:
                loss = base.loss(wanted, on.at(strength))
                if loss < min((one["loss"] for one in tried), default=math.inf):
                    taken = group, strength
                tried.append({"layer": float(group[0].layer or 0), "strength": strength, "loss": loss})
                if loss > last:
                    break  # stronger is worse from here on
                last = loss
        progress.advance(task)
    return *taken, tried


@dataclass(frozen=True)
class Found:
    """Directions that are taken, how strong they are, and what is known of them.

    Attributes:
        directions: by site.
        strength: at which they were best.
        said: where they come from.
        held: held-out rows by side, whose likelihood is to be measured; empty where there are none.
        prompts: of the held-out rows of the positive side; empty where these are whole texts.
        facts: what else goes into the result.
    """

    directions: dict[Site, Direction]
    strength: float
    said: str
    held: dict[str, list[Encoded]] = field(default_factory=dict)
    prompts: list[Example] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=lambda: {"rows": {}, "by layer": [], "tried": []})


def search(base: Base, sites: list[Site], contrasts: Contrasts, settings: SteerSettings, progress: Progress) -> Found:
    """The directions at the layers and with the strength that work best."""
    both = base.rows(contrasts.positive), base.rows(contrasts.negative)
    splits = [split(len(side), settings.eval_fraction, settings.seed) for side in both]
    sides = _Sides(both, splits)
    directions, told = _directions(base, sites, sides, contrasts.paired, settings, progress)
    chosen, strength, tried = _choose(base, directions, told, sides, contrasts.answers, settings, progress)
    rows = {"positive": len(both[0]), "negative": len(both[1]), "held out": len(sides.splits[0][1])}
    one, other = sides.held_out()
    held = {"positive": one, "negative": other} if contrasts.answers else {}
    if settings.train is not None:
        progress.add_task(f"Training ({settings.train})", total=None)
        directions = _trained(base, {site: directions[site] for site in chosen}, sides, settings)
        strength = settings.scale or 1.0
    facts = {"rows": rows, "by layer": told, "tried": tried}
    prompts = [row for index in sides.splits[0][1] if isinstance(row := contrasts.positive[index], Example)]
    return Found({site: directions[site] for site in chosen}, strength, contrasts.said, held, prompts, facts)


def _trained(
    base: Base, directions: dict[Site, Direction], sides: _Sides, settings: SteerSettings
) -> dict[Site, Direction]:
    """The directions after training on the pairs; at strength 1 they are as strong as they were learnt."""
    positive, negative = sides.rows
    rows = [{**positive[i], **{REJECTED + name: of for name, of in negative[i].items()}} for i in sides.splits[0][0]]
    with adapter(base, directions, {}, 1.0, settings, inference_mode=False) as peft:
        with tempfile.TemporaryDirectory() as folder:
            trainer = ReftTrainer(
                model=peft,
                args=ReftTrainingArguments(
                    folder, objective=str(settings.train), num_train_epochs=settings.epochs, learning_rate=settings.lr,
                    per_device_train_batch_size=settings.batch_size, seed=settings.seed, save_strategy="no",
                    report_to="none", disable_tqdm=True, use_cpu=base.model.device.type == "cpu",
                ),
                train_dataset=Dataset.from_list(rows),
                processing_class=base.tokenizer,
            )  # fmt: skip
            trainer.train()
        edits = peft.base_model.engine.edits("default")
        found = {}
        for site in directions:
            edit = edits[site.block_path].eval()
            rotation, bias = (tensor.detach().double().cpu().numpy() for tensor in (edit.rotation, edit.bias))
            found[site] = Direction(np.where(bias < 0, -1.0, 1.0)[:, None] * rotation, np.abs(bias))
    return found


def _apart(ranked: list[tuple[dict[str, float], Site]]) -> list[tuple[dict[str, float], Site]]:
    """The best layers, none beside another that is better."""
    taken: list[tuple[dict[str, float], Site]] = []
    for item in ranked:
        if len(taken) < _CANDIDATES and all(abs(item[0]["layer"] - other[0]["layer"]) > 1 for other in taken):
            taken.append(item)
    return taken


def method_of(settings: SteerSettings, gates: dict[Site, Gate]) -> str:
    """The edit's name."""
    return "gated" if gates else "consreft" if settings.remove else "lobireft"


@contextmanager
def adapter(
    base: Base,
    directions: dict[Site, Direction],
    gates: dict[Site, Gate],
    strength: float,
    settings: SteerSettings,
    inference_mode: bool = True,
) -> Iterator[Any]:
    """The PEFT model with the edits of these directions, for the length of a ``with`` block."""
    config = ReftConfig(
        method=method_of(settings, gates),
        r=settings.rank,
        layers_to_transform=[int(site.layer or 0) for site in directions],
        positions=settings.positions,
        init="paper",
        task_type="CAUSAL_LM",
        base_model_name_or_path=settings.model,
        inference_mode=inference_mode,
    )
    peft: Any = new_adapter(base.model, config)
    edits = peft.base_model.engine.edits("default")
    for site, direction in directions.items():
        own = edit_of(direction, strength, settings.remove)
        edits[site.block_path].load_state_dict((gated_edit(own, gates[site]) if gates else own).state_dict())
    try:
        yield peft.eval()
    finally:
        peft.unload()
