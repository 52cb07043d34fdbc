"""The tiny model, rows and finished run of the command line's tests."""

from tests.cli.conftest import cli, other_base, rows, tiny, trained  # noqa: F401
