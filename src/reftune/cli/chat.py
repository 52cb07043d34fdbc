"""`reftune chat`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from reftune.cli.common_options import (
    Device,
    Dtype,
    MaxNewTokens,
    Model,
    RepetitionPenalty,
    Seed,
    SystemPrompt,
    Temperature,
    TopP,
)

_HELP = "/base switches the edit off and on, /reset forgets the conversation, /quit or Ctrl-D ends it."


def chat(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Adapter folder: the --output of `reftune train`.")],
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    repetition_penalty: RepetitionPenalty = 1.1,
    seed: Seed = 0,
    system_prompt: SystemPrompt = None,
    model: Model = None,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Talk with an adapter. /base switches the edit off and on, /reset forgets, /quit or Ctrl-D ends."""
    import torch

    from reftune.errors import ReftuneError
    from reftune.inference.chat import Conversation
    from reftune.inference.generation import GenerationSettings
    from reftune.inference.loading import load_edited

    settings = GenerationSettings(max_new_tokens, temperature, top_p, repetition_penalty, seed=seed)
    console = Console(highlight=False)
    edited = load_edited(folder, model=model, dtype=dtype, device=device, system_prompt=system_prompt)
    torch.manual_seed(seed)
    talk = Conversation(edited, settings)
    console.print(f"{folder} is listening. {_HELP}", markup=False)
    while True:
        try:
            said = console.input(f"[bold]{'you' if talk.uses_edit else 'you (to the base model)'}>[/bold] ").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if not sys.stdin.isatty():
            console.print()  # the end of a line that nobody typed here
        if said == "/quit":
            return
        if said == "/reset":
            talk.reset()
            console.print("The conversation is forgotten.")
        elif said == "/base":
            talk.uses_edit = not talk.uses_edit
            console.print("The edit is on." if talk.uses_edit else "The edit is off: the base model answers.")
        elif said.startswith("/"):
            console.print(_HELP, markup=False)
        elif said:
            forgotten = talk.forgotten
            answer = talk.ask(said)
            try:
                for piece in answer:
                    console.print(piece, end="", markup=False, soft_wrap=True)
            except KeyboardInterrupt:  # ends the answer, not the conversation
                answer.close()
            except ReftuneError as error:
                console.print(f"Error: {error}", end="", markup=False)
            console.print()
            if talk.forgotten > forgotten:
                console.print(f"(The first {talk.forgotten} turns no longer fit the model's context.)", style="dim")
