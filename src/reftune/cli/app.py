"""The `reftune` command and the one place where its errors become a message and an exit status."""

from __future__ import annotations

import ast
import errno
import importlib
import logging
import os
import re
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from typer.core import TyperCommand, TyperGroup

from reftune.errors import ReftuneError
from reftune.output import terminal
from reftune.output.interrupt import interrupt
from reftune.runs import processes, run_training

USER_ERROR, INTERRUPTED = 2, 130

_QUIET = {
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}

NoSuchOption: Any = sys.modules[typer.BadParameter.__module__].NoSuchOption
"""Of the click that typer brings or uses."""

logger = logging.getLogger("reftune")


class GroupedHelp(TyperCommand):
    """A command whose help fits 80 columns: no boxes, and the options under the headings of their groups."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the groups in the order of their first options."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            kind = "Arguments" if parameter.param_type_name == "argument" else "Options"
            if record := parameter.get_help_record(ctx):
                flag = re.sub(r"^--(\S+) / --no-\1$", r"--[no-]\1", record[0])
                group = getattr(parameter, "rich_help_panel", None) or kind
                groups.setdefault(group, []).append((flag, record[1]))
        for title, records in groups.items():
            with formatter.section(title):
                formatter.write_dl(records, col_max=26)


class Command(NamedTuple):
    """A command of the line: its name, the module and function that carry it out, and settings for click."""

    name: str
    module: str
    function: str
    settings: dict[str, Any] | None = None

    def summary(self) -> str:
        """The first line of the function's docstring, read without importing its module."""
        source = Path(__file__).with_name(f"{self.module}.py").read_text(encoding="utf-8")
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef) and node.name == self.function:
                return (ast.get_docstring(node) or "").partition("\n")[0]
        raise LookupError(f"{self.module}.py has no function {self.function}")

    def load(self) -> Any:
        """The click command, made from the function's signature."""
        function = getattr(importlib.import_module(f"{__package__}.{self.module}"), self.function)
        alone = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None, add_completion=False)
        alone.command(self.name, cls=GroupedHelp, context_settings=self.settings)(function)
        return typer.main.get_command(alone)


def flags_meant(option: str, ctx: Any) -> list[str]:
    """The flags of a command that other libraries call by this name."""
    from reftune.cli.flags import flag_name
    from reftune.runs.recipe import recipe_fields

    there = {name for parameter in ctx.command.params for name in parameter.opts} if ctx else set()
    word = option.lstrip("-").replace("-", "_")
    return [flag for item in recipe_fields() if word in item.metadata["aka"] and (flag := flag_name(item)) in there]


class Commands(TyperGroup):
    """Makes a command when it is called, and of an error that the user can mend one message; a bug has a traceback."""

    registered: Sequence[Command] = ()
    """Every command in the order in which people meet them; the room's `__init__` has the list."""

    def list_commands(self, ctx: Any) -> list[str]:
        """In the order in which people meet them."""
        return [command.name for command in self.registered]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """A command's name and summary: enough for help and completion, with nothing imported."""
        found = self._named(cmd_name)
        return found and TyperCommand(found.name, help=found.summary(), rich_markup_mode="rich")

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that was called, made now."""
        name, command, rest = super().resolve_command(ctx, args)
        found = self._named(name or "")
        if found and name != "train" and processes.count() > 1:
            raise ReftuneError(f"reftune {name} runs in one process: call it without a launcher.")
        return name, found.load() if found else command, rest

    def _named(self, name: str) -> Command | None:
        return next((command for command in self.registered if command.name == name), None)

    def invoke(self, ctx: Any) -> Any:
        """Carry it out; print what the user can mend, and let a bug keep its traceback."""
        try:
            return super().invoke(ctx)
        except NoSuchOption as error:
            error.possibilities = flags_meant(error.option_name, error.ctx) or error.possibilities
            raise
        except (ReftuneError, KeyboardInterrupt, OSError, ImportError) as error:
            if ctx.params.get("debug") or isinstance(error, BrokenPipeError):
                raise
            message, status = _explain(error)
            if message is None:
                raise
            message = terminal.shortened(message)
            terminal.console(stderr=True).print(message, markup=False, highlight=False, soft_wrap=True)
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
    if isinstance(error, ImportError) and not (error.name or "").startswith("reftune"):
        return f"Error: a package is missing or damaged ({error}); install it again.", USER_ERROR
    return None, 1


app = typer.Typer(
    name="reftune",
    cls=Commands,
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
    """Let our own notes through and keep the libraries' to themselves; **changes the process's logging**.

    The libraries read these variables when they are imported, which is later: --help needs none of them.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    warnings.simplefilter("ignore")
    if not logger.handlers:
        notes = logging.StreamHandler()
        notes.setFormatter(terminal.PlainFormatter("%(message)s"))
        logger.addHandler(notes)
        logger.setLevel(logging.INFO)
        logger.propagate = False


def main() -> None:
    """Entry point of the `reftune` script; **SIGTERM is Ctrl-C in it**, so that a cluster's preemption saves too."""
    if processes.rank() > 0:
        processes.follow(run_training)
        return
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:  # which `nohup` and a shell's `&` leave for good reason
            signal.signal(number, interrupt)
    try:
        app()
    except BrokenPipeError:  # `reftune info DIR | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
