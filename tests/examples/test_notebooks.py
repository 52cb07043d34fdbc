"""The notebooks' code cells run from first to last, on a tiny model."""

from __future__ import annotations

import ast
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.cli.tiny_folder import save_tiny_model

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:transformers", "ignore::UserWarning:torch")


def cells(name: str) -> list[str]:
    notebook = json.loads((NOTEBOOKS / name).read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code), "clear the outputs"
    return ["".join(cell["source"]) for cell in code]


def run(name: str, replaced: dict[str, str]) -> dict[str, Any]:
    """Every code cell in order, each text of `replaced` changed in the cells that have it; what they leave."""
    names: dict[str, Any] = {}
    sources = cells(name)
    assert all(any(old in source for source in sources) for old in replaced), "a text that no cell has"
    for source in sources:
        for old, new in replaced.items():
            source = source.replace(old, new)
        tree = ast.parse(source)
        shown = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, name, "exec"), names)
        if isinstance(shown, ast.Expr):  # what the notebook shows
            names["shown"] = eval(compile(ast.Expression(shown.value), name, "eval"), names)
    return names


@pytest.mark.parametrize(
    ("name", "model", "folder"),
    [
        ("first_adapter.ipynb", "smollm2", "first-adapter"),
        ("ja/first_adapter.ipynb", "Qwen/Qwen2.5-0.5B-Instruct", "hajimete"),
    ],
)
def test_the_first_adapter(
    name: str, model: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny = save_tiny_model(tmp_path / "tiny")
    names = run(name, {f'"{model}"': repr(str(tiny)), "epochs=20": "epochs=2", "=32": "=4"})
    assert len(cells(name)) + len(markdown(name)) == 15
    assert (tmp_path / folder / "adapter" / "adapter_model.safetensors").is_file()
    assert repr(names["run"]).startswith("TrainedRun(") and len(repr(names["run"])) < 300
    said = capsys.readouterr().out
    assert "LoRA r8" in said and "base:  " in said and "edited:" in said
    assert names["lora_metrics"]["train_loss"] > 0


def test_the_english_and_the_japanese_notebook_run_the_same_code() -> None:
    def code(name: str) -> list[list[str]]:
        return [[line for line in cell.splitlines() if line.isascii()] for cell in cells(name)]

    english, japanese = code("first_adapter.ipynb"), code("ja/first_adapter.ipynb")
    assert english[2:] == japanese[2:] and len(english) == len(japanese)


def test_inside_a_model_and_an_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    tiny = save_tiny_model(tmp_path / "tiny", layers=3)
    small = {
        '"smollm2"': repr(str(tiny)), "60_000": "400", "(1000, 4)": "(50, 4)", "[8, 16, 24]": "[0, 1, 2]", "num_train_epochs=10": "num_train_epochs=1",
        "range(10)": "range(1)", "epochs=8": "epochs=1",
    }  # fmt: skip
    names = run("causal.ipynb", small)
    for shown in (names["found"], names["result"].heat_map):
        assert shown._repr_png_().startswith(b"\x89PNG")
    assert names["found"].columns[-1] == "o" and "next-token distribution" in capsys.readouterr().out


def markdown(name: str) -> list[str]:
    notebook = json.loads((NOTEBOOKS / name).read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "markdown"]


def test_links_of_notebooks_lead_somewhere() -> None:
    for path in NOTEBOOKS.rglob("*.ipynb"):
        for text in markdown(str(path.relative_to(NOTEBOOKS))):
            for target in re.findall(r"\]\(([^)#]+)\)", text):
                assert target.startswith("https:") or (path.parent / target).is_file(), f"{path.name}: {target}"


def test_steering_from_pairs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    moved: list[str] = []

    def interact(shown: Any, prompt: str, strength: float) -> None:
        capsys.readouterr()
        shown(prompt, strength)
        moved.append(capsys.readouterr().out)

    widgets = SimpleNamespace(FloatSlider=lambda value, **_: value, Text=lambda value, **_: value, interact=interact)
    monkeypatch.setitem(sys.modules, "ipywidgets", widgets)  # type: ignore[arg-type]
    monkeypatch.chdir(tmp_path)
    tiny = save_tiny_model(tmp_path / "tiny")
    # More than a model of random weights has to give: less is asked of it.
    names = run("steering.ipynb", {'"smollm2"': repr(str(tiny)), "kl=0.3": "kl=1e-4"})
    assert (tmp_path / "steering-notebook" / "cheerful" / "adapter_model.safetensors").is_file()
    assert names["found"]["kl, nats a token"] > 0 and len(moved) == 1
    assert names["answer"]("What is snow?", 0.0, tokens=4) is not None
