"""What a terminal is shown: text from files, models and people cannot move its cursor or colour it."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

_LONGEST = 4000
# C0 and C1 controls but tab and line feed, and the characters that turn the direction of writing.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    r"""The text with its control characters written out, as in ``\x1b[31m``."""
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def shortened(text: str) -> str:
    """A message without its middle where a value in it is longer than anybody reads."""
    if len(text) <= _LONGEST:
        return text
    return f"{text[: _LONGEST // 2]} [... {len(text) - _LONGEST:,} characters ...] {text[-_LONGEST // 2 :]}"


class PlainConsole(Console):
    """Rich's console, on which control characters of what is printed are `visible` and do nothing."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Rich's own segments; those that move the cursor are its progress bars'."""
        for segment in super().render(renderable, options):
            if segment.control is None and _CONTROLS.search(segment.text):
                segment = Segment(visible(segment.text), segment.style)
            yield segment


def console(stderr: bool = False, **options: Any) -> Console:
    """The console that everything is printed on.

    Args:
        stderr: print on standard error.
        **options: Rich's own.
    """
    return PlainConsole(stderr=stderr, **options)


class PlainFormatter(logging.Formatter):
    """Log messages with their control characters written out."""

    def format(self, record: logging.LogRecord) -> str:
        """The message as a terminal may show it."""
        return visible(super().format(record))
