"""`steer`: rows, directions, the layer and strength that work best, and an adapter folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from rich.console import Console
from rich.progress import Progress

from reftune import models
from reftune.adapter.config import ReftConfig, new_adapter
from reftune.data.formats import Example
from reftune.data.persona import neutral_rows
from reftune.data.tokenising import Encoding
from reftune.engine.position_grammar import parse_positions
from reftune.engine.sites import Site, find_sites
from reftune.errors import ReftuneError
from reftune.evaluation.judging import Judge, accepted_share, load_judge
from reftune.inference.generation import generate_answers
from reftune.inference.loading import EditedModel, within_context
from reftune.inference.settings import GenerationSettings
from reftune.output.files import write_text
from reftune.output.locks import only_writer, refuse_if_locked
from reftune.output.targets import check_file_target, check_folder_target
from reftune.runs.output_folder import save_adapter
from reftune.steering.contrasts import Contrasts, read_contrasts, split
from reftune.steering.directions import Direction
from reftune.steering.gates import Gate, balanced_accuracy, find_gate, open_shares, read_when
from reftune.steering.report import CARD_FILE, PICTURE_FILE, card, draw
from reftune.steering.search import Base, Found, adapter, method_of, search
from reftune.steering.settings import SteerSettings
from reftune.steering.states import token_states
from reftune.steering.strength import Neutral, steered
from reftune.steering.vectors import ANY_LAYER, holds_vectors, may_hold_vectors, read_vectors, write_vectors

RESULT_FILE = "steer.json"
_FEWEST = 4


@dataclass
class Steered:
    """What was found.

    Attributes:
        folder: the adapter.
        found: what `steer.json` holds.
    """

    folder: Path
    found: dict[str, Any] = field(default_factory=dict)


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
    base = Base(
        model, tokenizer, within_context(Encoding(tokenizer, on_long_prompt="truncate"), model), settings.batch_size
    )
    given = list(vectors) if vectors else "all"
    sites = find_sites(model, "block_output", given if settings.layers == "auto" else settings.layers)
    if settings.rank > min(site.width for site in sites):
        raise ReftuneError(f"rank={settings.rank}: the hidden state has {sites[0].width} dimensions.")
    with Progress(console=console, transient=True) as progress:
        if vectors is None:
            found = search(base, sites, contrasts or _read(source, settings, base), settings, progress)
        else:
            found = Found(_as_directions(vectors, sites, str(source)), settings.scale or 1.0, "a control vector")
        gates, told = _gates(base, list(found.directions), when, neutral, settings, progress) if when else ({}, [])
        progress.add_task("Measuring", total=None)
        result = _measure(base, found, measured_on, settings, gates)
        result["gates"] = told
        if judge is not None:
            with adapter(base, found.directions, gates, result["strength"], settings) as peft:
                result |= _judged(base, peft, found.prompts or neutral, judge, settings)
    strength = result["strength"]
    if settings.gguf:
        added = {int(site.layer or 0): strength * d.vector for site, d in found.directions.items()}
        write_vectors(settings.gguf, added, str(model.config.model_type))
    with only_writer(output):
        with adapter(base, found.directions, gates, strength, settings) as peft:
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


def _read(source: Any, settings: SteerSettings, base: Base | None = None) -> Contrasts:
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


def _written(base: Base, prompts: Sequence[Example], instruction: str | None, settings: SteerSettings) -> list[str]:
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


def _gates(
    base: Base,
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


def _measure(
    base: Base, found: Found, neutral: Sequence[Example], settings: SteerSettings, gates: dict[Site, Gate]
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
        "method": method_of(settings, gates),
        "layers": [int(site.layer or 0) for site in found.directions],
        "strength": 1.0 if settings.remove else strength,
        "held-out loss, base": before, "held-out loss, steered": after,
        "log-likelihood ratio, nats a token": _ratio(before, after),
        "kl, nats a token": kl, "standard error of kl": error, "kl behind the gate, nats a token": behind,
        "kl of each half at the other's strength": crossed, "neutral rows": len(plain.rows),
        "neutral loss, base": effect.base_loss, "neutral loss, steered": neutral_loss,
        **found.facts, "settings": asdict(settings),
    }  # fmt: skip


def _ratio(before: dict[str, float], after: dict[str, float]) -> float | None:
    """How much the log-likelihood of a positive token gained on that of a negative one."""
    if not before or not after:
        return None
    return (before["positive"] - after["positive"]) - (before["negative"] - after["negative"])


def _judged(base: Base, peft: Any, prompts: Sequence[Example], judge: Judge, settings: SteerSettings) -> dict[str, Any]:
    """The shares of greedy answers that a judge accepts, without the edit and with it."""
    greedy = GenerationSettings(max_new_tokens=settings.max_new_tokens, batch_size=settings.batch_size)
    edited, shares = EditedModel(peft, base.tokenizer, base.encoding), {}
    for name in ("base", "steered"):
        answers = generate_answers(edited, prompts, greedy, base=name == "base")
        shares[f"accepted, {name}"] = accepted_share(judge, [answer.text for answer in answers])
    return {**shares, "judged answers": len(prompts)}
