"""The notebooks' code cells run from first to last, on a tiny model."""

from __future__ import annotations

import json
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
    names: dict[str, Any] = {}
    for source in cells("steering.ipynb"):
        if 'MODEL = "smollm2"' in source:
            source = source.replace('"smollm2"', repr(str(tiny)))
        source = source.replace("kl=0.3", "kl=1e-4")  # more than a model of random weights has to give
        exec(compile(source, "steering.ipynb", "exec"), names)
    assert (tmp_path / "steering-notebook" / "cheerful" / "adapter_model.safetensors").is_file()
    assert names["found"]["kl, nats a token"] > 0 and len(moved) == 1
    assert names["answer"]("What is snow?", 0.0, tokens=4) is not None
