"""The report: one HTML file that needs nothing else, and Markdown with pictures beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reftune.comparison.figures import colour_of, draw_pictures
from reftune.comparison.runner import Comparison
from reftune.comparison.summary import MethodSummary, summarise
from reftune.comparison.tables import Column, fairness, result_columns, settings_rows, verdict
from reftune.data.formats import Example
from reftune.errors import ReftuneError
from reftune.evaluation.heldout import exact_match
from reftune.output.documents import rendered
from reftune.output.files import write_text
from reftune.runs.output_folder import readable_disk_errors

HTML_FILE, MARKDOWN_FILE, FIGURES = "report.html", "report.md", "figures"
_SHOWN = 8


@dataclass(frozen=True)
class Answered:
    """One prompt: its text, the expected completion, and (method, answer, whether they are equal) of each method."""

    prompt: str
    expected: str
    answers: list[tuple[str, str, bool]]

    def lines(self) -> list[tuple[str, str]]:
        """The expected completion, then each method's answer, as rows of a table."""
        return [("expected", self.expected), *((name, text) for name, text, _ in self.answers)]


def write_report(comparison: Comparison, summaries: Sequence[MethodSummary] | None = None) -> tuple[Path, Path]:
    """Write `report.html`, `report.md` and `figures/` into the comparison's folder; **replaces those there**.

    Args:
        comparison: what was run.
        summaries: of `summarise`; None: they are made here.

    Returns:
        The HTML file and the Markdown file.

    Raises:
        ReftuneError: no run is done yet.
    """
    summaries = summarise(comparison) if summaries is None else summaries
    if not summaries:
        raise ReftuneError(f"{comparison.recipe.folder} holds no finished run of this recipe; run it first.")
    recipe, pictures = comparison.recipe, draw_pictures(summaries)
    columns = result_columns(recipe, summaries)
    content: dict[str, Any] = {
        "title": recipe.title,
        "verdict": verdict(recipe, summaries),
        "summaries": summaries,
        "colours": colour_of(summaries),
        "columns": columns,
        "result_header": ["Method", *(f"{column.heading} ({column.unit})" for column in columns)],
        "result_rows": [[m.name, *(_cell(column, index) for column in columns)] for index, m in enumerate(summaries)],
        "settings": settings_rows(summaries),
        "fairness": fairness(recipe, summaries),
        "answered": _answered(comparison, summaries),
        "pictures": pictures,
        "recipe": recipe.to_yaml(),
        "versions": summaries[0].results[0].versions,
        "failed": comparison.failed,
        "missing": _missing(comparison),
    }
    folder = recipe.folder
    with readable_disk_errors(folder):
        (folder / FIGURES).mkdir(parents=True, exist_ok=True)
        for picture in pictures:
            (folder / FIGURES / f"{picture.name}.png").write_bytes(picture.png)
        for file in (MARKDOWN_FILE, HTML_FILE):
            write_text(folder / file, rendered("reftune.comparison", file, content))
    return folder / HTML_FILE, folder / MARKDOWN_FILE


def _missing(comparison: Comparison) -> list[str]:
    """Runs without a result, by name."""
    done = {(result.method, result.seed) for result in comparison.results}
    return [
        f"{method.name}, seed {seed}" for method, seed in comparison.recipe.runs() if (method.name, seed) not in done
    ]


def _answered(comparison: Comparison, summaries: Sequence[MethodSummary]) -> list[Answered]:
    rows = comparison.held_out[:_SHOWN]
    return [
        Answered(_prompt(row), row.completion.strip(), answers)
        for index, row in enumerate(rows)
        if (answers := [_answer(item, index, row) for item in summaries if index < len(item.results[0].answers)])
    ]


def _answer(item: MethodSummary, index: int, row: Example) -> tuple[str, str, bool]:
    text = item.results[0].answers[index]
    return item.name, text, exact_match(text, row.completion)


def _prompt(row: Example) -> str:
    return "\n".join(message.content.strip() for message in row.messages if message.role != "system")


def _cell(column: Column, index: int) -> str:
    text = f"**{column.cells[index]}**" if column.best == index else column.cells[index]
    return f"{text}<br>{column.notes[index]}" if column.notes[index] else text
