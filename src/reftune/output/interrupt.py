"""What Ctrl-C and SIGTERM do in the command, while nothing else (a training) has taken them over."""

from __future__ import annotations

import os
from types import FrameType

_IMPORTING = "importlib._bootstrap"


def interrupt(signum: int, frame: FrameType | None) -> None:
    """Raise ``KeyboardInterrupt``; within an import, where C++ would abort on it, **end the process** (128 + signal).

    Args:
        signum: the signal.
        frame: what it came into.
    """
    while frame is not None:
        if frame.f_globals.get("__name__") == _IMPORTING:
            os._exit(128 + signum)
        frame = frame.f_back
    raise KeyboardInterrupt
