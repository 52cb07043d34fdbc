"""`reftune lm-eval`."""

from __future__ import annotations

from typing import Annotated

import typer

_EXAMPLE = """\
lm-evaluation-harness with the model type `reftune` (from --model reftune, the default here):

  reftune lm-eval --model_args peft=DIR --tasks arc_easy,hellaswag --batch_size 8 --apply_chat_template

  peft=DIR          adapter folder; its base model, dtype and prompt template are those of training
  pretrained=NAME   another base model; without peft=DIR the base alone is scored

Everything else is the harness's own command:
"""


def lm_eval(
    arguments: Annotated[list[str] | None, typer.Argument(help="As for the harness's command `lm_eval`.")] = None,
) -> None:
    """Score an adapter on the tasks of lm-evaluation-harness; every argument is passed on to it."""
    from reftune.evaluation.lm_eval import run_harness

    if not arguments or arguments in (["--help"], ["-h"]):
        typer.echo(_EXAMPLE)
        arguments = ["run", "--help"]
    run_harness(arguments)
