"""The command line: parse, call, print. Commands import what they need when they run."""

from reftune.cli.app import app, main

__all__ = ["app", "main"]
