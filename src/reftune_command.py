"""The `reftune` script.

Where this module is loaded, the process is the command line, and `import reftune` leaves PEFT for later, so that --help
and a wrong flag answer at once: docs/decisions/0010-quick-to-start.md.
"""


def main() -> None:
    """Entry point of the `reftune` script."""
    from reftune.cli import main as run

    run()
