"""The report: one HTML file that needs nothing else, and Markdown with pictures beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from reftune.comparison.figures import Picture, colour_of, draw_pictures
from reftune.comparison.runner import Comparison
from reftune.comparison.summary import MethodSummary, summarise
from reftune.comparison.tables import Column, fairness, result_columns, settings_rows, verdict
from reftune.data.formats import Example
from reftune.errors import ReftuneError
from reftune.evaluation.heldout import exact_match
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


def write_report(comparison: Comparison) -> tuple[Path, Path]:
    """Write `report.html`, `report.md` and `figures/` into the comparison's folder; **replaces those there**.

    Returns:
        The HTML file and the Markdown file.

    Raises:
        ReftuneError: no run is done yet.
    """
    summaries = summarise(comparison)
    if not summaries:
        raise ReftuneError(f"{comparison.recipe.folder} holds no finished run of this recipe; run it first.")
    recipe, pictures = comparison.recipe, draw_pictures(summaries)
    content: dict[str, Any] = {
        "title": recipe.title,
        "verdict": verdict(recipe, summaries),
        "summaries": summaries,
        "colours": colour_of(summaries),
        "columns": result_columns(recipe, summaries),
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
        write_text(folder / MARKDOWN_FILE, _markdown(content))
        write_text(folder / HTML_FILE, _html(content))
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


def _html(content: dict[str, Any]) -> str:
    environment = Environment(
        loader=PackageLoader("reftune.comparison"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template("report.html.j2").render(content)


def _markdown(content: dict[str, Any]) -> str:
    summaries: Sequence[MethodSummary] = content["summaries"]
    columns: Sequence[Column] = content["columns"]
    pictures: Sequence[Picture] = content["pictures"]
    header = ["Method", *(f"{column.heading} ({column.unit})" for column in columns)]
    rows = [[item.name, *(_cell(column, index) for column in columns)] for index, item in enumerate(summaries)]
    parts = [f"# {content['title']}", *(f"- {sentence}" for sentence in content["verdict"])]
    parts = [parts[0], "\n".join(parts[1:])]
    if content["missing"]:
        parts.append(f"Not finished: {'; '.join(content['missing'])}.")
    parts += ["## Results", _table(header, rows, right=True)]
    parts += [f"![{picture.caption}]({FIGURES}/{picture.name}.png)\n\n{picture.caption}" for picture in pictures]
    settings = [list(row) for row in content["settings"]]
    parts += ["## Methods", _table(["Method", "Kind", "Settings", "Prefix reuse"], settings)]
    if content["answered"]:
        parts.append(f"## Answers side by side\n\nSeed {summaries[0].results[0].seed}, greedy.")
        for found in content["answered"]:
            lines = [["expected", found.expected], *([name, text] for name, text, _ in found.answers)]
            parts.append(f"**{_one_line(found.prompt)}**\n\n{_table(['', 'Answer'], lines)}")
    parts += ["## How it was measured", "\n".join(f"- {line}" for line in content["fairness"])]
    versions = ", ".join(f"{name} {value}" for name, value in content["versions"].items())
    parts += ["## Recipe", f"```yaml\n{content['recipe']}```", f"Versions: {versions}."]
    return "\n\n".join(parts) + "\n"


def _cell(column: Column, index: int) -> str:
    text = f"**{column.cells[index]}**" if column.best == index else column.cells[index]
    return f"{text}<br>{column.notes[index]}" if column.notes[index] else text


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], right: bool = False) -> str:
    line = ["---", *(("---:" if right else "---") for _ in header[1:])]
    cells = [[_one_line(cell).replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in (list(header), line, *cells))


def _one_line(text: str) -> str:
    return " ".join(text.split()) or "–"
