"""`reftune demo`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from reftune.output import terminal

if TYPE_CHECKING:
    from reftune.inference.generation import Answer


def demo(
    output: Annotated[str, typer.Option(help="Folder of the adapter.")] = "demo-output",
    seed: Annotated[int, typer.Option(help="Seed of the training.")] = 0,
) -> None:
    """Train the bundled model to talk like a pirate, and compare it with itself. Two minutes on two cores, offline."""
    import time
    from dataclasses import replace

    from reftune.cli.results import side_by_side
    from reftune.data.persona import PERSONA
    from reftune.runs.demo import DEMO, MEASURE, run_demo

    console, begun = terminal.console(), time.perf_counter()
    recipe = replace(DEMO, output=output, seed=seed, overwrite=True)
    console.print(
        f"Training {recipe.method}, rank {recipe.rank}, layers {recipe.layers}, positions {recipe.positions}, of "
        f"{recipe.model}, to answer as {PERSONA}.",
        highlight=False,
    )
    result = run_demo(recipe)
    console.print(
        side_by_side(
            result.prompts,
            [_shown(answer) for answer in result.base],
            [_shown(answer) for answer in result.edited],
            title="Prompts that training did not see",
            marks=(result.base_in_style, result.edited_in_style),
        )
    )
    count, metrics = len(result.prompts), result.run.metrics
    for name, marks in (("base", result.base_in_style), ("edited", result.edited_in_style)):
        console.print(
            f"{name:>6}: {sum(marks)} of {count} answers in style ({sum(marks) / count:.0%})", highlight=False
        )
    console.print(MEASURE, style="dim", highlight=False)
    console.print(
        f"{metrics['trainable_parameters']:,} trainable parameters, trained in {sum(metrics['epoch_seconds']):.0f} s "
        f"at {metrics['tokens_per_second']:,.0f} tokens a second; {time.perf_counter() - begun:.0f} s in all.",
        highlight=False,
    )
    console.print(
        f"Saved in {output}. Talk with it: reftune chat {output}", markup=False, highlight=False, soft_wrap=True
    )


def _shown(answer: Answer) -> str:
    """The answer, with an ellipsis where it was cut off at the token limit."""
    return answer.text + (" \N{HORIZONTAL ELLIPSIS}" if answer.hit_limit else "")
