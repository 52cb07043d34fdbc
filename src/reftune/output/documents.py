"""Pages for people: templates filled in, and tables in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


def rendered(package: str, name: str, content: dict[str, Any]) -> str:
    """The template `templates/NAME.j2` of a package with its content; what goes into HTML is escaped.

    Markdown templates have the filter `one_line` and the function `table` (see `markdown_table`).
    """
    environment = Environment(
        loader=PackageLoader(package), autoescape=name.endswith(".html"), undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=name.endswith(".md"),
    )  # fmt: skip
    environment.globals["table"] = markdown_table
    environment.filters["one_line"] = one_line
    return environment.get_template(f"{name}.j2").render(content)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], right: int | None = None) -> str:
    """A table in Markdown, whose columns from number `right` (from 0) on are numbers."""
    line = ["---:" if right is not None and column >= right else "---" for column in range(len(header))]
    cells = [[one_line(cell).replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in (list(header), line, *cells))


def one_line(text: str) -> str:
    """Text without line breaks, a dash where there is none."""
    return " ".join(text.split()) or "–"
