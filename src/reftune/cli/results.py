"""Tables that several commands print."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from reftune.output.terminal import visible

if TYPE_CHECKING:
    from reftune.evaluation.task_report import TaskReport
    from reftune.evaluation.task_runs import Metric
    from reftune.runs.steps import TrainedRun
    from reftune.users.run import UsersRun


def write_out(path: Path, text: str, console: Console, told: str = "Written to") -> None:
    """Write what a command's `--out` names, its folder made, and say so."""
    from reftune.output.files import write_text
    from reftune.runs.output_folder import readable_disk_errors

    with readable_disk_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    console.print(f"{told} {path}", markup=False, highlight=False, soft_wrap=True)


def print_training(run: TrainedRun, console: Console) -> None:
    """What training came to, and the commands that come next."""
    metrics = run.metrics
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("trainable parameters", f"{metrics['trainable_parameters']:,}")
    if run.losses:
        table.add_row(
            "training loss", f"{run.losses[0]:.4f} -> {run.losses[-1]:.4f} (mean {metrics['train_loss']:.4f})"
        )
    if metrics["eval_loss"] is not None:
        table.add_row("held-out loss", f"{metrics['eval_loss']:.4f}")
    for part in ("validation", "test", "test_mismatched", "test_file"):
        if isinstance(score := metrics.get(part), dict):
            for name, value in score["metrics"].items():
                low, high = score["intervals"][name]
                shown = f"{value:.4f}  ({low:.4f} to {high:.4f}, {score['rows']:,} rows)"
                table.add_row(f"{part.replace('_', ' ')} {name.replace('_', ' ')}", shown)
    table.add_row("seconds", f"{sum(metrics['epoch_seconds']):.1f}")
    for name in ("reward", "eval_reward", "reward_margin", "reward_accuracy"):
        if name in metrics:
            table.add_row(name.replace("_", " ").replace("eval", "held-out"), f"{metrics[name]:.4f}")
    if "tokens_per_second" in metrics:
        table.add_row("tokens a second", f"{metrics['tokens_per_second']:,.0f}")
    console.print(table)
    console.print(f"Saved in {run.folder}. Try it: {_next_command(run)}", soft_wrap=True, highlight=False, markup=False)


def print_users(run: UsersRun, console: Console) -> None:
    """What training of many users came to, and the command that comes next."""
    metrics = run.metrics
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("users", f"{metrics['users']:,}")
    table.add_row("parameters of a user", f"{metrics['trainable_parameters']:,}")
    table.add_row("training loss", f"{metrics['train_loss']:.4f} (mean of the users')")
    if metrics["eval_loss"] is not None:
        table.add_row("held-out loss", f"{metrics['eval_loss']:.4f} (mean of the users')")
    table.add_row("seconds", f"{metrics['seconds']:.1f}")
    console.print(table)
    told = f"Saved in {run.folder}. Each user's losses: {run.folder}/{run.results.name}"
    console.print(told, soft_wrap=True, highlight=False, markup=False)


def _next_command(run: TrainedRun) -> str:
    if run.metrics.get("task") == "classification":
        return f"reftune predict {run.folder} --file FILE"
    return f"reftune chat {run.folder}"


def side_by_side(
    prompts: Sequence[str],
    base: Sequence[str],
    edited: Sequence[str],
    title: str | None = None,
    marks: tuple[Sequence[bool], Sequence[bool]] | None = None,
) -> Table:
    """Base and edited answers to the same prompts; `marks` says which of each are in style."""
    table = Table(title=title, title_justify="left", show_lines=True, expand=True)
    for name, ratio in (("prompt", 2), ("base", 4), ("edited", 4)):
        table.add_column(name, ratio=ratio, overflow="fold")
    for index, prompt in enumerate(prompts):
        cells = [Text(visible(base[index].strip())), Text(visible(edited[index].strip()))]
        if marks is not None:
            for cell, in_style in zip(cells, marks, strict=True):
                if in_style[index]:
                    cell.append(" [in style]", "green")
        table.add_row(Text(visible(prompt.strip())), *cells)
    return table


def task_table(report: TaskReport) -> Table:
    """Accuracy with its 95% interval by task, the models side by side, and how sure their difference is."""
    models = report.models
    table = Table(title="Accuracy, % (95% interval)", title_justify="left")
    table.add_column("task", no_wrap=True)
    table.add_column("rows", justify="right", no_wrap=True)
    for name in models:
        table.add_column(name, justify="right")
    if len(models) == 2:
        table.add_column("difference", justify="right")
        table.add_column("p", justify="right", no_wrap=True)
    for task, found in report.scores.items():
        first = found[models[0]]
        if not first.metrics:
            table.add_row(task, str(len(first.records)), *("answers written" for _ in models))
        for metric, _ in first.metrics.items():
            label = task if metric == "accuracy" else f"{task}, {metric}"
            cells = [_share(found[model].metrics[metric]) for model in models]
            if (gap := report.difference(task, metric)) is not None:
                span = f"({100 * gap.interval.low:+.1f} to {100 * gap.interval.high:+.1f})"
                cells += [f"{100 * gap.mean:+.1f} {span}", f"{gap.p_value:.2g}"]
            table.add_row(label, str(len(first.records)), *cells)
    for group, means in report.averages().items():
        cells = [f"{100 * means[model]:.1f}" for model in models]
        gap_text = [f"{100 * (means['edited'] - means['base']):+.1f}"] if len(models) == 2 else []
        table.add_row(f"{group}, mean", "", *cells, *gap_text, style="bold")
    return table


def _share(metric: Metric) -> str:
    return f"{100 * metric.value:.1f} ({100 * metric.interval.low:.1f} to {100 * metric.interval.high:.1f})"
