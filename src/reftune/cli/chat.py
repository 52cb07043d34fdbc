"""`reftune chat`."""

from __future__ import annotations

import io
import sys
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from rich.console import Console

from reftune.cli.common_options import BASE_MODEL, SAMPLED, Adapters, ChatTemplateKwargs, SystemPrompt
from reftune.cli.flags import with_flags
from reftune.inference.settings import BaseModel, GenerationSettings
from reftune.output import terminal
from reftune.runs.recipe_values import given, read_flags

_HELP = (
    "/base switches the edit off and on, /scale 0.5 weakens it, /adapters 0.5*one - two takes several, "
    "/reset forgets the conversation, /quit or Ctrl-D ends it."
)
_DEFAULTS = {"max_new_tokens": 512, "repetition_penalty": 1.1}


def chat(
    folder: Adapters,
    system_prompt: SystemPrompt = None,
    chat_template_kwargs: ChatTemplateKwargs = None,
    **flags: Any,
) -> None:
    """Talk with an adapter. /base switches the edit off and on, /scale 0.5 weakens it, /reset forgets, /quit ends."""
    settings = read_flags(GenerationSettings, {**_DEFAULTS, **given(flags)})
    import torch

    from reftune.errors import ReftuneError
    from reftune.inference.chat import Conversation
    from reftune.inference.loading import load_mixture

    console = terminal.console(highlight=False)
    spoken_to = {"system_prompt": system_prompt, "chat_template_kwargs": chat_template_kwargs}
    edited = load_mixture(folder, **spoken_to, **asdict(read_flags(BaseModel, flags)))
    torch.manual_seed(settings.seed)
    talk = Conversation(edited, settings)
    if isinstance(sys.stdin, io.TextIOWrapper):  # bytes that are no UTF-8 come as marks, which are told below
        sys.stdin.reconfigure(errors="surrogateescape")
    console.print(f"{folder} is listening. {_HELP}", markup=False)
    while True:
        try:
            said = typed(console, "you> " if talk.uses_edit else "you (to the base model)> ").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if not sys.stdin.isatty():
            console.print()  # the end of a line that nobody typed here
        if not _is_text(said):
            problem = ReftuneError("what was typed is not UTF-8; write it again, in a terminal or file that is.")
            if not sys.stdin.isatty():
                raise problem
            console.print(f"Error: {problem}", markup=False)
            continue
        if said == "/quit":
            return
        if said == "/reset":
            talk.reset()
            console.print("The conversation is forgotten.")
        elif said == "/base":
            talk.uses_edit = not talk.uses_edit
            console.print("The edit is on." if talk.uses_edit else "The edit is off: the base model answers.")
        elif said.split()[:1] == ["/scale"]:
            console.print(_scaled(edited, said.removeprefix("/scale").strip()), markup=False)
        elif said.split()[:1] == ["/adapters"]:
            console.print(_mixed(edited, said.removeprefix("/adapters").strip()), markup=False)
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


def typed(console: Console, prompt: str) -> str:
    """A line of standard input; on a terminal it can be edited, and earlier lines come back with the arrow keys."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        with suppress(ImportError):  # Windows has no readline, and edits lines without
            import readline  # noqa: F401

            return input(f"\x01\x1b[1m\x02{prompt}\x01\x1b[0m\x02")  # the marks: what takes no room on the line
    return console.input(f"[bold]{prompt}[/bold]")


def _scaled(edited: Any, written: str) -> str:
    """Set the edit's scale; what to say of it."""
    from reftune.errors import ReftuneError
    from reftune.inference.loading import set_scale

    try:
        set_scale(edited.model, float(written), edited.strengths)
    except (ValueError, ReftuneError):
        return "Write a number: /scale 0.5 is half of the edit, 1 all of it, -1 the other way."
    return f"The edit is multiplied by {float(written):g}."


def _mixed(edited: Any, written: str) -> str:
    """Let the adapters of an expression edit; what to say of them."""
    from reftune.errors import ReftuneError
    from reftune.inference.loading import mix

    try:
        return "Editing: " + ", ".join(f"{weight:g} of {folder.name}" for folder, weight in mix(edited, written)) + "."
    except ReftuneError as error:
        return f"Error: {error}"


def _is_text(said: str) -> bool:
    try:
        said.encode()
    except UnicodeEncodeError:
        return False
    return True


with_flags(chat, [item for item in SAMPLED if item[0].name != "batch_size"] + BASE_MODEL, **_DEFAULTS)
