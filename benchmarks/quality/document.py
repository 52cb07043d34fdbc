"""QUALITY.md: tables of all tasks, pictures, and which of the bars are met."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import torch

from benchmarks.quality.rates import tried_rates
from benchmarks.quality.tasks import REFERENCE, TASKS, Task
from reftune.comparison import Comparison, MethodSummary, RunResult, summarise
from reftune.output.files import write_text


def write_document(found: list[tuple[Task, Comparison, list[float]]], path: Path, pictures: Path) -> None:
    """Write the document and copy the pictures that it shows."""
    lines = [
        "# Quality", "",
        f"`python -m benchmarks.quality --search`, then `python -m benchmarks.quality`, on {platform.machine()}, torch "
        f"{torch.__version__}, float32, SmolLM2-135M-Instruct. Every method trains on the same rows, batches and epochs, "
        "with the same loss (LoRA, on q and v, is trained with reftune's supervised-only logits, which spares it time). "
        "Losses are held-out, in nats a supervised token, after the last epoch: the mean over seeds, the lowest and "
        "highest seed, and a 95% bootstrap interval over rows. p is a paired test against LoRA r8 on the same rows. "
        "Seconds are of training, two runs sharing the machine, one thread each. r is the rank; where none is named it "
        "is 4. Four layers are 10, 14, 18, 22, one layer is 14, all are 30. Edits start as the identity but where "
        "the paper's start is named.", "",
        "Learning rates are those of the ones tried that did best on validation rows, which are neither trained on nor "
        "reported, with seed 0; the last section has all of them. Where that section lacks a method, its one rate was set "
        "beforehand.", "",
    ]  # fmt: skip
    missing = [other.title for name, other in TASKS.items() if name not in {task.name for task, _, _ in found}]
    if missing:
        lines += [f"Not run for this document: {'; '.join(missing)}.", ""]
    verdicts: list[str] = []
    for task, comparison, peer in found:
        summaries = summarise(comparison)
        lines += [f"## {task.title}", "", _rows_of(comparison), "", *_table(summaries), ""]
        lines += _pictures(task, comparison, pictures)
        table, verdict = beside_each_epoch(comparison)
        lines += ["### Within LoRA's seconds", "", *table, ""]
        verdicts += [
            *_a_tenth(task, summaries),
            f"- {_word(verdict)}: {task.name}: quality a training second: {_IN_TIME}",
        ]
        if peer:
            ours = next(item for item in summaries if item.name == task.pyreft)
            text, verdict = _beside_pyreft(ours, peer)
            lines += ["### Beside pyreft, equal settings", "", text, ""]
            verdicts.append(verdict)
    rates = ["## Learning rates tried", "", *_rates([task for task, _, _ in found])]
    write_text(path, "\n".join([*lines, "## Bars", "", *verdicts, "", *rates]) + "\n")


_IN_TIME = (
    "at every epoch of LoRA's, an edit that was trained for no more seconds has no higher held-out loss (the table in "
    "its section)."
)


def beside_each_epoch(comparison: Comparison) -> tuple[list[str], bool]:
    """The best edit within the seconds that LoRA takes to each of its epochs, and whether it is ahead at all of them.

    Both are the best loss of any epoch so far, by method, seconds and losses being means over seeds.
    """
    edits = {m.name: reached(comparison.of(m.name)) for m in comparison.recipe.methods if m.edits}
    lines = ["| seconds | LoRA | loss | best edit by then | loss |", "|---:|---|---:|---|---:|"]
    ahead = True
    for method in (m for m in comparison.recipe.methods if m.kind == "lora"):
        for seconds, loss in reached(comparison.of(method.name)):
            within = [(low, name) for name, points in edits.items() for s, low in points if s <= seconds]
            best = min(within, default=None)
            ahead &= best is not None and best[0] <= loss
            shown = f"{best[1]} | {best[0]:.3f}" if best else "none has an epoch by then |"
            lines.append(f"| {seconds:.0f} | {method.name} | {loss:.3f} | {shown} |")
    return lines, ahead


def reached(results: Sequence[RunResult]) -> list[tuple[float, float]]:
    """After each epoch: seconds of training so far, and the lowest held-out loss so far; means over seeds."""
    points: list[tuple[float, float]] = []
    for epoch in range(min(len(result.epoch_seconds) for result in results)):
        seconds = mean(sum(result.epoch_seconds[: epoch + 1]) for result in results)
        loss = mean(result.curve[epoch + 1][1] for result in results)
        points.append((seconds, min([loss, *(low for _, low in points)])))
    return points


def _rates(tasks: list[Task]) -> list[str]:
    lines = ["| task | method | rate: loss on validation rows |", "|---|---|---|"]
    for task in tasks:
        for name, tried in tried_rates(task).items():
            lines.append(
                f"| {task.name} | {name} | {', '.join(f'{rate}: {loss:.3f}' for rate, loss in tried.items())} |"
            )
    return lines


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
    heads = ["method", "parameters", "loss", "seeds", "95% interval", "minus LoRA", "p", "seconds", "peak GiB"]
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


def _a_tenth(task: Task, summaries: list[MethodSummary]) -> list[str]:
    """Whether an edit of at most a tenth of LoRA's parameters reaches its loss."""
    reference = next(item for item in summaries if item.name == REFERENCE)
    small = [item for item in summaries if item.method.edits and item.parameters * 10 <= reference.parameters]
    best = min(small, key=lambda item: item.loss)
    return [
        f"- {_word(best.loss <= reference.loss)}: {task.name}: at most a tenth of the {reference.parameters:,} parameters of "
        f"{reference.name} reaches its held-out loss: {best.name} with {best.parameters:,} comes to {best.loss:.3f} "
        f"(seeds {best.seed_range.low:.3f} to {best.seed_range.high:.3f}), {reference.name} to {reference.loss:.3f} "
        f"(seeds {reference.seed_range.low:.3f} to {reference.seed_range.high:.3f})."
    ]


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
