from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from reftune.comparison import Comparison, resolve_comparison, run_comparison, summarise, write_report
from reftune.comparison.tables import factor_text, size_text, verdict
from reftune.errors import ReftuneError


@pytest.fixture(scope="module")
def report(compared: Comparison, tmp_path_factory: pytest.TempPathFactory) -> tuple[Comparison, str, str, Path]:
    folder = tmp_path_factory.mktemp("report")
    recipe = replace(compared.recipe, shared=replace(compared.recipe.shared, output=str(folder)))
    found = replace(compared, recipe=recipe)
    page, text = write_report(found)
    return found, page.read_text(), text.read_text(), folder


class _Checker(HTMLParser):
    """Collects tags that are not closed, identifiers, and everything that a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "br", "link", "img", "input"):
            self.open.append(tag)
        for name, value in attrs:
            if name == "id" and value:
                self.ids.append(value)
            if name in ("src", "href", "xlink:href", "srcset", "data") and not (value or "").startswith("#"):
                self.fetched.append(f"{tag} {name}={value}")

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"


@pytest.mark.parametrize(("ratio", "text"), [(1.5, "1.5"), (3.02, "3"), (13.3, "13"), (99.9, "100"), (1234.5, "1,234")])
def test_a_factor_is_written_plainly(ratio: float, text: str) -> None:
    assert factor_text(ratio) == text


def test_the_page_is_whole_and_fetches_nothing(report: tuple[Comparison, str, str, Path]) -> None:
    _, page, _, _ = report
    checker = _Checker()
    checker.feed(page)
    assert not checker.open and not checker.fetched
    assert len(set(checker.ids)) == len(checker.ids), "two pictures share an identifier"
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\((?!#)", page)
    assert page.count("<svg") == 5
    references = re.findall(r'(?:href="#|url\(#)([^")]+)', page)
    assert references and set(references) <= set(checker.ids)


def test_the_page_follows_the_theme_and_the_width(report: tuple[Comparison, str, str, Path]) -> None:
    _, page, _, _ = report
    assert "prefers-color-scheme: dark" in page and 'name="viewport"' in page
    pictures = "".join(re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL))
    assert "currentColor" in pictures
    assert not re.search(r"#(000000|ffffff|010203)\b", pictures), "ink or paper that one of the themes would hide"
    assert page.index('class="scroll"') < page.index("<table"), "a wide table must scroll in its own box"


def test_the_markdown_holds_the_numbers_of_the_results(report: tuple[Comparison, str, str, Path]) -> None:
    found, _, text, folder = report
    for result in found.results:
        row = next(line for line in text.splitlines() if line.startswith(f"| {result.method} |"))
        cells = [cell.strip().split("<br>")[0].strip("*") for cell in row.split("|")[1:-1]]
        assert cells[1] == f"{result.loss:.4f}"
        assert f"{result.trainable_parameters:,}" in cells
        assert f"{result.exact_match:.1%}" in cells and f"{result.option_accuracy:.1%}" in cells
        if result.method != "base":
            assert f"{result.train_seconds:,.1f}" in cells
            assert any(cell.startswith(size_text(result.adapter_bytes)) for cell in cells)
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)
    assert len(pictures) == 5
    assert all((folder / picture).read_bytes().startswith(b"\x89PNG") for picture in pictures)


def test_page_and_markdown_show_the_same_cells(report: tuple[Comparison, str, str, Path]) -> None:
    _, page, text, _ = report
    body = page.split("<tbody>")[1].split("</tbody>")[0]
    shown = [re.sub(r"<[^>]+>", "", cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", body)]
    rows = text.split("## Results\n\n")[1].split("\n\n")[0].splitlines()[2:]
    written = [re.sub(r"\*\*|<br>", "", cell).strip() for row in rows for cell in row.split("|")[2:-1]]
    assert [cell.replace("&lt;", "<") for cell in shown] == written


def test_what_an_answer_says_is_text_and_not_markup(compared: Comparison, tmp_path: Path) -> None:
    recipe = replace(compared.recipe, shared=replace(compared.recipe.shared, output=str(tmp_path)))
    hostile = [replace(result, answers=["<script>alert(1)</script> | x", "ok"]) for result in compared.results]
    page, text = write_report(replace(compared, recipe=recipe, results=tuple(hostile)))
    assert "<script>" not in page.read_text()
    assert "\\| x" in text.read_text()


def test_a_difference_is_judged_against_the_reference(compared: Comparison) -> None:
    found = {item.name: item for item in summarise(compared)}
    reference, other = found["LoRA"], found["DiReFT all"]
    assert reference.difference is None and other.difference is not None
    assert other.difference.mean == pytest.approx(other.loss - reference.loss)
    assert 0 < other.difference.p_value <= 1
    assert other.interval.low <= other.loss <= other.interval.high
    cheapest = min((item for item in found.values() if item.method.trains), key=lambda item: item.parameters)
    best = min(found.values(), key=lambda item: item.loss)
    assert "parameters" in cheapest.frontier and "parameters" in best.frontier
    beaten = [item for item in found.values() if item.parameters > best.parameters]
    assert all("parameters" not in item.frontier for item in beaten)


@pytest.mark.parametrize(
    ("rows", "seeds", "said"),
    [
        (
            4,
            1,
            "No verdict against LoRA: too few rows, one seed; it takes 20 held-out rows and 3 seeds: LoReFT l1 (loss",
        ),
        (4, 3, "No verdict against LoRA: too few rows; it takes"),
        (20, 2, "No verdict against LoRA: 2 seeds; it takes"),
        (20, 3, "Better than LoRA: LoReFT l1 (by "),
    ],
)
def test_better_is_said_from_enough_rows_and_seeds(compared: Comparison, rows: int, seeds: int, said: str) -> None:
    method, reference = (compared.of(name)[0] for name in ("LoReFT l1", "LoRA"))
    times = rows // len(reference.row_tokens)
    losses = reference.row_losses * times
    reference = replace(reference, row_losses=losses, row_tokens=reference.row_tokens * times)
    method = replace(method, row_losses=[loss - 1 for loss in losses], row_tokens=reference.row_tokens)
    runs = tuple(replace(run, seed=seed) for run in (method, reference) for seed in range(seeds))
    found = replace(compared, results=runs)
    sentences = verdict(found.recipe, summarise(found))
    assert len(sentences) == 2 and sentences[1].startswith(said)


def test_a_report_says_which_runs_are_missing(
    compared: Comparison, written: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    shutil.copytree(compared.recipe.folder, tmp_path / "out")
    flags = {"output": str(tmp_path / "out"), "seeds": [0, 1]}
    recipe = resolve_comparison(compared.recipe.given, flags)
    found = run_comparison(recipe, report_only=True)
    _, text = write_report(found)
    assert "LoRA, seed 1" in text.read_text() and "LoRA, seed 0" not in text.read_text()
    with pytest.raises(ReftuneError, match="no finished run"):
        write_report(run_comparison(resolve_comparison(written(tmp_path / "none")), report_only=True))
