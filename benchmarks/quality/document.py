"""QUALITY.md: tables of all tasks, pictures, and which of the bars are met."""

from __future__ import annotations

import platform
import shutil
from pathlib import Path
from statistics import mean

import torch

from benchmarks.quality.tasks import TASKS, Task
from reftune.comparison import Comparison, MethodSummary, summarise
from reftune.runs import write_text


def write_document(found: list[tuple[Task, Comparison, list[float]]], path: Path, pictures: Path) -> None:
    """Write the document and copy the pictures that it shows."""
    lines = [
        "# Quality", "",
        f"`python -m benchmarks.quality` on {platform.machine()}, torch {torch.__version__}, float32, "
        "SmolLM2-135M-Instruct. Every method trains on the same rows, batches and epochs, with the same loss (LoRA is "
        "trained with reftune's supervised-only logits, which spares it time). Losses are held-out, in nats a supervised "
        "token, after the last epoch: the mean over seeds, the lowest and highest seed, and a 95% bootstrap interval over "
        "rows. p is a paired test against LoRA r8 on the same rows. Seconds are of training, two runs sharing the "
        "machine, one thread each.", "",
    ]  # fmt: skip
    missing = [other.title for name, other in TASKS.items() if name not in {task.name for task, _, _ in found}]
    if missing:
        lines += [f"Not run for this document: {'; '.join(missing)}.", ""]
    verdicts: list[str] = []
    for task, comparison, peer in found:
        summaries = summarise(comparison)
        lines += [f"## {task.title}", "", _rows_of(comparison), "", *_table(summaries), ""]
        lines += _pictures(task, comparison, pictures)
        verdicts += _verdicts(task, summaries)
        if peer:
            ours = next(item for item in summaries if item.name == task.pyreft)
            text, verdict = _beside_pyreft(ours, peer)
            lines += ["### Beside pyreft, equal settings", "", text, ""]
            verdicts.append(verdict)
    write_text(path, "\n".join([*lines, "## Bars", "", *verdicts]) + "\n")


def _rows_of(comparison: Comparison) -> str:
    result = comparison.results[0]
    steps = max(item.steps for item in comparison.results)
    shared = comparison.recipe.shared
    return (
        f"{len(result.row_tokens)} held-out rows with {sum(result.row_tokens)} supervised tokens; {steps} steps of "
        f"{shared.batch_size} rows, {shared.epochs:g} epochs; seeds {', '.join(map(str, comparison.recipe.seeds))}."
    )


def _table(summaries: list[MethodSummary]) -> list[str]:
    options = any(item.options for item in summaries)
    heads = ["method", "parameters", "loss", "seeds", "95% interval", "less LoRA", "p", "seconds", "peak GiB"]
    heads += ["options right", "interval"] if options else []
    lines = ["| " + " | ".join(heads) + " |", "|---" + "|---:" * (len(heads) - 1) + "|"]
    for item in summaries:
        cells = [
            item.name,
            f"{item.parameters:,}" if item.method.trains else "",
            f"{item.loss:.3f}",
            f"{item.seed_range.low:.3f} to {item.seed_range.high:.3f}",
            f"{item.interval.low:.3f} to {item.interval.high:.3f}",
            f"{item.difference.mean:+.3f}" if item.difference else "",
            f"{item.difference.p_value:.3f}" if item.difference else "",
            f"{item.seconds:.0f}" if item.method.trains else "",
            f"{item.memory / 1024**3:.2f}" if item.memory and item.method.trains else "",
        ]
        if options:
            interval = item.options_interval
            cells += [f"{item.options['acc']:.1%}", f"{interval.low:.1%} to {interval.high:.1%}" if interval else ""]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _pictures(task: Task, comparison: Comparison, folder: Path) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for file in sorted((comparison.recipe.folder / "figures").glob("*.png")):
        copy = folder / f"quality-{task.name}-{file.name}"
        shutil.copyfile(file, copy)
        lines += [f"![{file.stem}](pictures/{copy.name})", ""]
    return lines


def _verdicts(task: Task, summaries: list[MethodSummary]) -> list[str]:
    """A tenth of LoRA's parameters, and quality a training second."""
    lora = {item.name: item for item in summaries if item.method.kind == "lora"}
    edits = [item for item in summaries if item.method.edits]
    if not lora or not edits:
        return []
    reference = min((item for item in lora.values() if "r8" in item.name), key=lambda item: item.loss)
    small = [item for item in edits if item.parameters * 10 <= reference.parameters]
    lines = []
    if small:
        best = min(small, key=lambda item: item.loss)
        met = best.loss <= reference.loss
        lines.append(
            f"- {_word(met)}: {task.name}: at most a tenth of the {reference.parameters:,} parameters of {reference.name} reaches its "
            f"held-out loss: {best.name} with {best.parameters:,} comes to {best.loss:.3f} against {reference.loss:.3f} "
            f"(seeds {best.seed_range.low:.3f} to {best.seed_range.high:.3f})."
        )
    cheapest = min(lora.values(), key=lambda item: item.loss)
    ahead = [item for item in edits if item.seconds < cheapest.seconds and item.loss <= cheapest.loss]
    if ahead:
        best = min(ahead, key=lambda item: item.seconds)
        lines.append(
            f"- met: {task.name}: quality a training second is ahead of LoRA: {best.name} comes to {best.loss:.3f} in "
            f"{best.seconds:.0f} s, {cheapest.name} to {cheapest.loss:.3f} in {cheapest.seconds:.0f} s."
        )
    else:
        best = min(edits, key=lambda item: item.loss)
        lines.append(
            f"- not met: {task.name}: quality a training second is not ahead of LoRA: the best edit, {best.name}, comes to "
            f"{best.loss:.3f} in {best.seconds:.0f} s, {cheapest.name} to {cheapest.loss:.3f} in {cheapest.seconds:.0f} s."
        )
    return lines


def _beside_pyreft(ours: MethodSummary, peer: list[float]) -> tuple[str, str]:
    mine = [result.loss for result in ours.results]
    text = (
        f"{ours.name}: reftune {mean(mine):.4f} (seeds {', '.join(f'{x:.4f}' for x in mine)}), pyreft 0.1.0 "
        f"{mean(peer):.4f} (seeds {', '.join(f'{x:.4f}' for x in peer)}). Both start at random as the paper's code does, "
        "so that seeds differ in the start and in the order of rows."
    )
    spread = max(max(mine) - min(mine), max(peer) - min(peer))
    met = abs(mean(mine) - mean(peer)) <= spread
    difference = f"{mean(mine) - mean(peer):+.4f} nats, seed spread {spread:.4f}"
    return text, f"- {_word(met)}: LoReFT equals pyreft's held-out loss within its seed spread: {difference}."


def _word(met: bool) -> str:
    return "met" if met else "not met"
