"""The one exception that means "the user can mend this", and what is told once.

The command line prints a `ReftuneError` and exits with status 2.
"""

import logging

_told: set[str] = set()


class ReftuneError(ValueError):
    """A request that cannot be carried out; the message names the file, row or field, its value, and the way out."""


def tell_once(logger: logging.Logger, line: str) -> None:
    """Log a warning, unless this process has logged the same line before."""
    if line not in _told:
        _told.add(line)
        logger.warning("%s", line)
