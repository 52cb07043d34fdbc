"""`steer`: rows, directions, the layer and strength that work best, and an adapter folder."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from datasets import Dataset
from rich.console import Console
from rich.progress import Progress

from reftune import models
from reftune.adapter.config import ReftConfig, new_adapter
from reftune.data.formats import Example
from reftune.data.persona import neutral_rows
from reftune.data.tokenising import REJECTED, Encoded, Encoding
from reftune.engine.position_grammar import parse_positions
from reftune.engine.sites import Site, find_sites
from reftune.errors import ReftuneError
from reftune.evaluation.judging import Judge, accepted_share, load_judge
from reftune.evaluation.row_losses import row_losses
from reftune.inference.generation import generate_answers
from reftune.inference.loading import EditedModel, within_context
from reftune.inference.settings import GenerationSettings
from reftune.output.files import write_text
from reftune.output.locks import only_writer, refuse_if_locked
from reftune.output.targets import check_file_target, check_folder_target
from reftune.runs.output_folder import save_adapter
from reftune.steering.contrasts import Contrasts, Row, read_contrasts, split
from reftune.steering.directions import Direction, find_directions, gap_in_deviations, separation
from reftune.steering.gates import Gate, balanced_accuracy, find_gate, gated_edit, open_shares, read_when
from reftune.steering.report import CARD_FILE, PICTURE_FILE, card, draw
from reftune.steering.settings import SteerSettings
from reftune.steering.states import mean_states, token_states
from reftune.steering.strength import Neutral, edit_of, steered
from reftune.steering.vectors import ANY_LAYER, holds_vectors, may_hold_vectors, read_vectors, write_vectors
from reftune.training.arguments import ReftTrainingArguments
from reftune.training.objectives import Forward
from reftune.training.supervised_logits import supervised_forward
from reftune.training.trainer import ReftTrainer

RESULT_FILE = "steer.json"
_CANDIDATES = 4
_STRENGTHS = (0.5, 1.0, 2.0)
_FEWEST = 4
_TRIED = 6
"""Held-out rows of each side on which layers and strengths are tried."""


@dataclass
class Steered:
    """What was found.

    Attributes:
        folder: the adapter.
        found: what `steer.json` holds.
    """

    folder: Path
    found: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Base:
    """The base model and how it reads rows."""

    model: Any
    tokenizer: Any
    encoding: Encoding
    batch_size: int

    @property
    def pad(self) -> int:
        return int(self.tokenizer.pad_token_id)

    def rows(self, rows: Sequence[Row]) -> list[Encoded]:
        return self.encoding.dataset(rows).to_list()  # type: ignore[arg-type, return-value]

    def prompts(self, rows: Sequence[Example]) -> list[Encoded]:
        """Rows of which some have no completion."""
        return [
            self.rows([row])[0] if row.completion.strip()
            else {"input_ids": (ids := self.encoding.generation_prompt(row)), "labels": [], "prompt_length": len(ids)}
            for row in rows
        ]  # fmt: skip

    def loss(self, rows: Sequence[Encoded], forward: Forward = supervised_forward) -> float:
        return row_losses(self.model, rows, self.pad, self.batch_size, forward).per_token


def steer(source: Any, settings: SteerSettings, console: Console) -> Steered:
    """Find a direction and write it as an adapter; **the output folder is written** when everything is known.

    Args:
        source: pairs, prompts, labelled texts or examples (see `contrasts`).
        settings: what and how.
        console: for progress.

    Raises:
        ReftuneError: rows, settings or an output that cannot be used.
    """
    output = Path(settings.output).expanduser()
    inputs = [source, settings.neutral_file, settings.when]
    check_folder_target(output, "output=", (RESULT_FILE,), inputs, settings.model)
    refuse_if_locked(output)
    if settings.gguf:
        check_file_target(Path(settings.gguf), "--gguf", inputs, ours=holds_vectors)
    neutral = neutral_rows(settings.neutral_file)
    measured_on = neutral_rows(settings.neutral_file, many=settings.kl is not None)
    when = None if settings.when is None else read_when(settings.when, settings.when_label)
    # What cannot be used is told before a model is loaded; answers to be written need one.
    vectors = read_vectors(source) if may_hold_vectors(source) else None
    if vectors and ANY_LAYER in vectors and settings.layers == "auto":
        raise ReftuneError(f"{source} does not say which layer it is for: name it, --layers 8.")
    if vectors and settings.train is not None:
        raise ReftuneError(f"train={settings.train!r} needs pairs of answers, and {source} is a control vector.")
    judge = None if settings.judge is None else load_judge(settings.judge)
    contrasts = None if vectors or settings.positive_prompt is not None else _read(source, settings)
    transformers.set_seed(settings.seed)
    model, tokenizer = models.load(settings.model, settings.dtype, settings.device)
    model.requires_grad_(False)  # or nothing below an edit would count as constant
    base = _Base(
        model, tokenizer, within_context(Encoding(tokenizer, on_long_prompt="truncate"), model), settings.batch_size
    )
    given = list(vectors) if vectors else "all"
    sites = find_sites(model, "block_output", given if settings.layers == "auto" else settings.layers)
    if settings.rank > min(site.width for site in sites):
        raise ReftuneError(f"rank={settings.rank}: the hidden state has {sites[0].width} dimensions.")
    with Progress(console=console, transient=True) as progress:
        if vectors is None:
            found = _search(base, sites, contrasts or _read(source, settings, base), settings, progress)
        else:
            found = _Found(_as_directions(vectors, sites, str(source)), settings.scale or 1.0, "a control vector")
        gates, told = _gates(base, list(found.directions), when, neutral, settings, progress) if when else ({}, [])
        progress.add_task("Measuring", total=None)
        result = _measure(base, found, measured_on, settings, gates)
        result["gates"] = told
        if judge is not None:
            with _adapter(base, found.directions, gates, result["strength"], settings) as peft:
                result |= _judged(base, peft, found.prompts or neutral, judge, settings)
    strength = result["strength"]
    if settings.gguf:
        added = {int(site.layer or 0): strength * d.vector for site, d in found.directions.items()}
        write_vectors(settings.gguf, added, str(model.config.model_type))
    with only_writer(output):
        with _adapter(base, found.directions, gates, strength, settings) as peft:
            save_adapter(peft, output)
        draw(result, output / PICTURE_FILE)
        write_text(output / CARD_FILE, card(result, settings.model))
        write_text(output / RESULT_FILE, json.dumps(result, indent=2) + "\n")
    return Steered(output, result)


def _as_directions(vectors: dict[int, Any], sites: Sequence[Site], source: str) -> dict[Site, Direction]:
    """The vectors of a file at sites of a model."""
    found = {}
    for site in sites:
        vector = vectors.get(-1 if site.layer is None else site.layer, vectors.get(ANY_LAYER))
        if vector is None:
            raise ReftuneError(f"{source} has no vector for layer {site.layer}; it has {', '.join(map(str, vectors))}.")
        if len(vector) != site.width:
            raise ReftuneError(f"{source} has vectors of width {len(vector)}, and the model's are {site.width} wide.")
        length = float(np.linalg.norm(vector.astype(np.float64)))
        found[site] = Direction(vector[None].astype(np.float64) / length, np.array([length]))
    return found


def _read(source: Any, settings: SteerSettings, base: _Base | None = None) -> Contrasts:
    instructions = None
    if settings.positive_prompt is not None and settings.negative_prompt is not None:
        instructions = settings.positive_prompt, settings.negative_prompt
    contrasts = read_contrasts(
        source,
        columns=settings.columns,  # type: ignore[arg-type]
        limit=settings.limit_rows,
        positive_label=settings.positive_label,
        instructions=instructions,
        write=None if base is None else lambda prompts, text: _written(base, prompts, text, settings),
    )
    if settings.train is not None and not (contrasts.paired and contrasts.answers):
        raise ReftuneError(
            f"train={settings.train!r} needs pairs: a prompt, and a positive and a negative answer to it."
        )
    fewest = min(len(contrasts.positive), len(contrasts.negative))
    if fewest < _FEWEST:
        raise ReftuneError(f"There are {fewest} rows of a side; at least {_FEWEST} are needed, as some are held out.")
    return contrasts


def _written(base: _Base, prompts: Sequence[Example], instruction: str | None, settings: SteerSettings) -> list[str]:
    """Greedy answers of the base model, under an instruction or as it is."""
    nothing = ReftConfig(method="lobireft", r=1, layers_to_transform=[0], task_type="CAUSAL_LM")
    peft: Any = new_adapter(base.model, nothing)
    encoding = Encoding(base.tokenizer, system_prompt=instruction, max_length=base.encoding.limit)
    greedy = GenerationSettings(max_new_tokens=settings.max_new_tokens, batch_size=settings.batch_size)
    answers = generate_answers(EditedModel(peft, base.tokenizer, encoding), prompts, greedy, base=True)
    try:
        return [answer.text for answer in answers]
    finally:
        peft.unload()


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
    base: _Base, sites: list[Site], sides: _Sides, paired: bool, settings: SteerSettings, progress: Progress
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
    base: _Base,
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


def _gates(
    base: _Base,
    sites: list[Site],
    when: tuple[list[Example], list[Example]],
    neutral: Sequence[Example],
    settings: SteerSettings,
    progress: Progress,
) -> tuple[dict[Site, Gate], list[dict[str, float]]]:
    """A gate for every site that is edited, and how well each tells prompts that had no part in it apart.

    Where the answers' tokens are edited and the rows have none, the model writes them.
    """
    positions = parse_positions(settings.positions)
    progress.add_task("Finding where to act", total=None)

    def states(rows: Sequence[Example]) -> list[Any]:
        if positions.generated and (asked := [row for row in rows if not row.completion.strip()]):
            answers = iter(_written(base, asked, None, settings))
            rows = [row if row.completion.strip() else replace(row, completion=next(answers)) for row in rows]
        return token_states(base.model, base.prompts(rows), sites, positions, base.pad, base.batch_size)

    act, rest, plain = states(when[0]), states(when[1]), states(neutral)
    splits = [split(len(side), settings.eval_fraction, settings.seed, held=2) for side in (act, rest)]
    gates: dict[Site, Gate] = {}
    told: list[dict[str, float]] = []
    for place, site in enumerate(sites):
        parts = [
            [np.concatenate([side[row][place] for row in rows]) for rows in parts_of]
            for side, parts_of in zip((act, rest), splits, strict=True)
        ]
        gate = gates[site] = find_gate(parts[0][0], parts[1][0], parts[0][1], parts[1][1])
        accuracy = balanced_accuracy(gate, parts[0][2], parts[1][2])
        tokens, prompts = open_shares(gate, [row[place] for row in plain])
        told.append(
            {
                "layer": float(site.layer or 0), "threshold": gate.threshold, "held-out accuracy": accuracy,
                "neutral tokens": tokens, "neutral prompts": prompts,
            }
        )  # fmt: skip
    return gates, told


@dataclass(frozen=True)
class _Found:
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


def _search(
    base: _Base, sites: list[Site], contrasts: Contrasts, settings: SteerSettings, progress: Progress
) -> _Found:
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
    return _Found({site: directions[site] for site in chosen}, strength, contrasts.said, held, prompts, facts)


def _trained(
    base: _Base, directions: dict[Site, Direction], sides: _Sides, settings: SteerSettings
) -> dict[Site, Direction]:
    """The directions after training on the pairs; at strength 1 they are as strong as they were learnt."""
    positive, negative = sides.rows
    rows = [{**positive[i], **{REJECTED + name: of for name, of in negative[i].items()}} for i in sides.splits[0][0]]
    with _adapter(base, directions, {}, 1.0, settings, inference_mode=False) as peft:
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


def _measure(
    base: _Base, found: _Found, neutral: Sequence[Example], settings: SteerSettings, gates: dict[Site, Gate]
) -> dict[str, Any]:
    """What the edit does, its gates open, and what it does behind them: the result as it is written."""
    plain = Neutral(base.model, base.rows(neutral), base.pad, base.batch_size)
    every = [*plain.rows, *(row for rows in found.held.values() for row in rows)]
    edits = partial(steered, base.model, found.directions, settings.positions, remove=settings.remove, rows=every)
    with edits() as on:
        if settings.kl is None:
            effect, crossed = plain.effect(on, found.strength), []
        else:
            effect, crossed = plain.calibrated(on, settings.kl, found.strength)
        strength = effect.strength
        after = {side: base.loss(rows, on.at(strength)) for side, rows in found.held.items()}
        before = {side: base.loss(rows, on.at(0.0)) for side, rows in found.held.items()}
    kl, error, neutral_loss = effect.told
    if not np.isfinite([kl, neutral_loss, *after.values()]).all():
        raise ReftuneError(
            f"At strength {strength:.3g} the model's answers are no longer finite numbers: choose a smaller --scale, "
            "or give vectors of the size of the hidden states."
        )
    behind = None
    if gates:
        with edits(gates=gates) as on:
            behind = plain.effect(on, strength).kl_of()
    return {
        "from": found.said,
        "method": _method(settings, gates),
        "layers": [int(site.layer or 0) for site in found.directions],
        "strength": 1.0 if settings.remove else strength,
        "held-out loss, base": before, "held-out loss, steered": after,
        "log-likelihood ratio, nats a token": _ratio(before, after),
        "kl, nats a token": kl, "standard error of kl": error, "kl behind the gate, nats a token": behind,
        "kl of each half at the other's strength": crossed, "neutral rows": len(plain.rows),
        "neutral loss, base": effect.base_loss, "neutral loss, steered": neutral_loss,
        **found.facts, "settings": asdict(settings),
    }  # fmt: skip


def _apart(ranked: list[tuple[dict[str, float], Site]]) -> list[tuple[dict[str, float], Site]]:
    """The best layers, none beside another that is better."""
    taken: list[tuple[dict[str, float], Site]] = []
    for item in ranked:
        if len(taken) < _CANDIDATES and all(abs(item[0]["layer"] - other[0]["layer"]) > 1 for other in taken):
            taken.append(item)
    return taken


def _ratio(before: dict[str, float], after: dict[str, float]) -> float | None:
    """How much the log-likelihood of a positive token gained on that of a negative one."""
    if not before or not after:
        return None
    return (before["positive"] - after["positive"]) - (before["negative"] - after["negative"])


def _method(settings: SteerSettings, gates: dict[Site, Gate]) -> str:
    return "gated" if gates else "consreft" if settings.remove else "lobireft"


@contextmanager
def _adapter(
    base: _Base,
    directions: dict[Site, Direction],
    gates: dict[Site, Gate],
    strength: float,
    settings: SteerSettings,
    inference_mode: bool = True,
) -> Iterator[Any]:
    """The PEFT model with the edits of these directions, for the length of a ``with`` block."""
    config = ReftConfig(
        method=_method(settings, gates),
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


def _judged(
    base: _Base, peft: Any, prompts: Sequence[Example], judge: Judge, settings: SteerSettings
) -> dict[str, Any]:
    """The shares of greedy answers that a judge accepts, without the edit and with it."""
    greedy = GenerationSettings(max_new_tokens=settings.max_new_tokens, batch_size=settings.batch_size)
    edited, shares = EditedModel(peft, base.tokenizer, base.encoding), {}
    for name in ("base", "steered"):
        answers = generate_answers(edited, prompts, greedy, base=name == "base")
        shares[f"accepted, {name}"] = accepted_share(judge, [answer.text for answer in answers])
    return {**shares, "judged answers": len(prompts)}
