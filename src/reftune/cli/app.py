"""The `reftune` command and the one place where its errors become a message and an exit status."""

from __future__ import annotations

import errno
import logging
import os
import sys
import warnings
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from reftune.errors import ReftuneError

USER_ERROR, INTERRUPTED = 2, 130
_ORDER = ("demo", "train", "generate", "chat", "eval", "predict", "compare", "sweep", "info", "env")

logger = logging.getLogger("reftune")


class _Commands(TyperGroup):
    """Turns what the user can mend into one message on standard error; a bug keeps its traceback."""

    def list_commands(self, ctx: Any) -> list[str]:
        """In the order in which people meet them."""
        known = [name for name in _ORDER if name in self.commands]
        return [*known, *sorted(set(self.commands) - set(known))]

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (ReftuneError, KeyboardInterrupt, OSError) as error:
            if ctx.params.get("debug") or isinstance(error, BrokenPipeError):
                raise
            message, status = _explain(error)
            if message is None:
                raise
            Console(stderr=True).print(message, markup=False, highlight=False, soft_wrap=True)
            ctx.exit(status)


def _explain(error: BaseException) -> tuple[str | None, int]:
    """The message and the exit status; None where the error is not the user's to mend."""
    if isinstance(error, KeyboardInterrupt):
        return str(error) or "Interrupted.", INTERRUPTED
    if isinstance(error, ReftuneError):
        return f"Error: {error}", USER_ERROR
    if isinstance(error, OSError) and error.errno is not None:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        what = "the disk is full; make room and try again" if full else os.strerror(error.errno)
        where = f"{error.filename}: " if error.filename else ""
        return f"Error: {where}{what}", USER_ERROR
    return None, 1


app = typer.Typer(
    name="reftune",
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Representation finetuning (ReFT): learn a small edit of a model's hidden states, and use it.",
)


def _version(wanted: bool) -> bool:
    if wanted:
        from reftune import __version__

        typer.echo(f"reftune {__version__}")
        raise typer.Exit()
    return wanted


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    quieten()


def quieten() -> None:
    """Let our own notes through and keep the libraries' to themselves; **changes the process's logging**."""
    import datasets
    import transformers

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.simplefilter("ignore")
    if not logger.handlers:
        notes = logging.StreamHandler()
        notes.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(notes)
        logger.setLevel(logging.INFO)
        logger.propagate = False


def main() -> None:
    """Entry point of the `reftune` script."""
    try:
        app()
    except BrokenPipeError:  # `reftune info DIR | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


# Each module adds its command to `app`.
from reftune.cli import (  # noqa: E402, F401
    chat,
    compare,
    demo,
    env,
    evaluate,
    generate,
    import_pyreft,
    info,
    lm_eval,
    predict,
    sweep,
    train,
)
