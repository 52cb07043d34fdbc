from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from typer.testing import CliRunner

import reftune
from reftune.adapter.info import read_adapter_info
from reftune.cli import app
from tests.tiny_models import TINY


def _saved(folder: Path, **settings: object) -> Path:
    torch.manual_seed(0)
    model = get_peft_model(TINY["llama"](), reftune.ReftConfig(task_type="CAUSAL_LM", **settings))  # type: ignore[arg-type]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "reft_" in name and not name.endswith("rotation"):
                parameter.normal_()
    model.save_pretrained(str(folder))
    return folder


def test_the_norms_are_those_of_what_the_edit_adds(tmp_path: Path) -> None:
    folder = _saved(tmp_path, r=2, layers_to_transform=[1])
    (edit,) = read_adapter_info(folder).edits
    held = load_file(folder / "adapter_model.safetensors")
    tensors = {name.rpartition(".")[2]: value for name, value in held.items()}
    R, W, b = tensors["rotation"], tensors["weight"], tensors["bias"]
    assert edit.layer == 1 and edit.part == "both"
    assert edit.linear_norm == pytest.approx(float(torch.linalg.norm(R.T @ (W - R))), rel=1e-5)
    assert edit.constant_norm == pytest.approx(float(b.norm()), rel=1e-4)
    assert edit.parameters == sum(value.numel() for value in tensors.values())


def test_an_untied_pair_is_two_edits(tmp_path: Path) -> None:
    folder = _saved(tmp_path, r=2, layers_to_transform=[0, 2], positions="f1+l2", share_weights=False)
    info = read_adapter_info(folder)
    found = [(edit.layer, edit.part) for edit in info.edits]
    assert found == [
        (0, "prefix"),
        (0, "suffix"),
        (2, "prefix"),
        (2, "suffix"),
    ]
    assert info.parameters == sum(edit.parameters for edit in info.edits) > 0


def test_an_edit_with_an_activation_has_tensor_norms_alone(tmp_path: Path) -> None:
    (edit,) = read_adapter_info(_saved(tmp_path, r=2, layers_to_transform=0, act_fn="relu", init="paper")).edits
    assert edit.linear_norm is None and edit.constant_norm is None
    assert set(edit.norms) == {"rotation", "weight", "bias"}


def test_the_table_marks_what_each_edit_of_a_pair_touches(tmp_path: Path) -> None:
    settings = {"r": 2, "layers_to_transform": [1], "positions": "f1+l2+generated", "share_weights": False}
    result = CliRunner().invoke(app, ["info", str(_saved(tmp_path, **settings))])
    assert result.exit_code == 0, result.output
    marks = [[letter for letter in line if letter in "●·"] for line in result.output.splitlines()]
    assert [row for row in marks if row] == [list("●···"), list("··●●")]
    assert all(name in result.output for name in ("first 1", "rest", "last 2", "answer"))
