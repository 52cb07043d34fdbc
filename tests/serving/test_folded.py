"""Folders read as arithmetic, against the edits that PEFT loads from the same folders."""

from __future__ import annotations

import ast
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import reftune
from reftune.adapter.checkpoint import CONFIG_FILE, WEIGHTS_FILE
from reftune.edits import Edit, FoldedEdit, available_edits
from reftune.serving.folded import SiteEdit, read_folded
from tests.serving.adapters import edits_of, save_adapter
from tests.test_rooms import SOURCE
from tests.tiny_models import CAUSAL, HIDDEN

METHODS = sorted(
    set(available_edits()) & {"loreft", "direft", "nodireft", "noreft", "consreft", "lobireft", "direft_orthogonal"}
)
CONFIGS = [
    *({"method": method} for method in METHODS),
    {"method": "noreft", "add_bias": True},
    *({"method": m, "parametrization": "householder", "r": 8} for m in ("loreft", "consreft", "direft_orthogonal")),
    {"positions": "f2+l3", "share_weights": False},
    {"positions": "l3", "share_weights": False},
    {"layers_to_transform": [2, 0], "component": "mlp_output"},
    {"layers_to_transform": -1, "component": "head_output[1,3]"},
    {"act_fn": "linear"},
]


@pytest.fixture(scope="module")
def llama():
    return CAUSAL["llama"]()


@pytest.fixture()
def folder(llama, tmp_path: Path) -> Path:
    return save_adapter(llama, tmp_path / "poet", layers_to_transform=[0, 2])


def tensors(edit: FoldedEdit) -> list[Tensor]:
    return [edit.A, edit.b, edit.B]


def by_place(edits: tuple[SiteEdit, ...]) -> dict[str, SiteEdit]:
    return {edit.block + (":suffix" if edit.part == "suffix" else ""): edit for edit in edits}


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_linear_edit_folds_to_the_bit_as_the_edit_that_peft_loads(llama, tmp_path: Path, config) -> None:
    folder = save_adapter(llama, tmp_path, **config)
    expected = edits_of(llama, folder)
    found = by_place(read_folded(folder).edits)
    assert found.keys() == expected.keys()
    for place, edit in expected.items():
        assert isinstance(edit, Edit)
        folded = found[place].folded
        assert folded is not None and found[place].width == edit.width
        for one, other in zip(tensors(folded), tensors(edit.fold()), strict=True):
            assert torch.equal(one, other)


def test_a_half_precision_file_folds_as_what_peft_makes_of_it(llama, folder: Path) -> None:
    path = folder / WEIGHTS_FILE
    save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path)
    expected = edits_of(llama, folder)
    for place, edit in by_place(read_folded(folder).edits).items():
        assert isinstance(one := expected[place], Edit) and edit.folded is not None
        assert all(map(torch.equal, tensors(edit.folded), tensors(one.fold())))


@pytest.mark.parametrize("config", [{"act_fn": "relu"}, {"method": "gated"}], ids=str)
def test_an_edit_that_is_not_linear_is_kept_as_the_edit_itself(llama, tmp_path: Path, config) -> None:
    folder = save_adapter(llama, tmp_path, parametrization="householder", **config)
    adapter = read_folded(folder)
    h = torch.randn(5, HIDDEN)
    assert not adapter.linear
    for place, edit in edits_of(llama, folder).items():
        found = by_place(adapter.edits)[place]
        assert found.folded is None and found.module is not None and found.width == HIDDEN
        with torch.no_grad():
            assert torch.equal(found.module(h), edit(h))


class Shifted(nn.Module):
    """A user's edit, no subclass of ``Edit``, with a module inside and a constant that is not saved."""

    def __init__(self, width: int, r: int):
        super().__init__()
        self.down = nn.Linear(width, r)
        self.register_buffer("constant", torch.full((width,), 0.5), persistent=False)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.down(h).sum(-1, keepdim=True) * self.get_buffer("constant")


def test_a_users_edit_is_kept_as_a_module_and_draws_no_random_number(llama, tmp_path: Path) -> None:
    reftune.register_edit("shifted")(Shifted)
    with torch.random.fork_rng(devices=[]):
        from peft import get_peft_model

        peft = get_peft_model(llama, reftune.ReftConfig(method="shifted", layers_to_transform=[1]))
        peft.save_pretrained(str(tmp_path))
        peft.unload()
    before = torch.get_rng_state()
    (edit,) = read_folded(tmp_path).edits
    assert torch.equal(torch.get_rng_state(), before)
    h = torch.randn(3, HIDDEN)
    (expected,) = edits_of(llama, tmp_path).values()
    assert edit.module is not None and torch.equal(edit.module(h), expected(h))


def test_what_an_adapter_says_of_itself(llama, tmp_path: Path) -> None:
    adapter = read_folded(
        save_adapter(llama, tmp_path, positions="f1+l2+generated", share_weights=False, layers_to_transform=[1, 2])
    )
    assert adapter.positions.text == "f1+l2+generated" and adapter.untied and adapter.component == "block_output"
    assert [(edit.block, edit.layer, edit.part) for edit in sorted(adapter.edits, key=lambda e: (e.block, e.part))] == [
        ("model.layers.1", 1, "prefix"), ("model.layers.1", 1, "suffix"),
        ("model.layers.2", 2, "prefix"), ("model.layers.2", 2, "suffix"),
    ]  # fmt: skip
    assert adapter.nbytes == 4 * 4 * (2 * HIDDEN * 4 + 4)


def test_the_digest_is_of_the_content(llama, folder: Path, tmp_path: Path) -> None:
    first = read_folded(folder).digest
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    assert read_folded(copy).digest == first
    changed = load_file(copy / WEIGHTS_FILE)
    next(iter(changed.values()))[0] += 1e-6
    save_file(changed, copy / WEIGHTS_FILE)
    config = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps({**config, "positions": "l2"}))
    assert len({read_folded(copy).digest, read_folded(folder).digest, first}) == 3


def change_config(folder: Path, **values) -> None:
    path = folder / CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def change_tensors(folder: Path, change) -> None:
    held = load_file(folder / WEIGHTS_FILE)
    save_file(change(held), folder / WEIGHTS_FILE)


DAMAGE = {
    "no folder": (lambda f: shutil.rmtree(f), "is not a folder"),
    "no weights": (lambda f: (f / WEIGHTS_FILE).unlink(), "does not exist"),
    "cut off": (lambda f: (f / WEIGHTS_FILE).write_bytes((f / WEIGHTS_FILE).read_bytes()[:-9]), "not an intact"),
    "not JSON": (lambda f: (f / CONFIG_FILE).write_text("{"), "not valid JSON"),
    "LoRA": (lambda f: change_config(f, peft_type="LORA"), "not 'REFT'"),
    "unknown method": (lambda f: change_config(f, method="loraft"), "method='loraft'"),
    "no positions": (lambda f: change_config(f, positions=None), "positions=None"),
    "wrong positions": (lambda f: change_config(f, positions="x3"), "positions='x3'"),
    "another rank": (lambda f: change_config(f, r=3), r"shape \(4"),
    "rank as text": (lambda f: change_config(f, r="4"), "r='4'"),
    "more layers": (lambda f: change_config(f, layers_to_transform=[0, 1, 2]), "not saved whole"),
    "untied by the file alone": (
        lambda f: change_config(f, positions="f1+l1", share_weights=False),
        "not saved whole",
    ),
    "share_weights as text": (lambda f: change_config(f, share_weights="no"), "share_weights='no'"),
    "modules_to_save": (lambda f: change_config(f, modules_to_save=["lm_head"]), "modules_to_save"),
    "trained tokens": (lambda f: change_config(f, trainable_token_indices=[3]), "trainable_token_indices"),
    "another method": (lambda f: change_config(f, method="direft"), "projection"),
    "a foreign tensor": (lambda f: change_tensors(f, lambda t: {**t, "lm_head.weight": torch.ones(2)}), "lm_head.weight"),
    "a tensor too few": (lambda f: change_tensors(f, lambda t: dict(list(t.items())[1:])), "holds nothing for"),
    "integers": (lambda f: change_tensors(f, lambda t: {n: v.int() for n, v in t.items()}), "int32"),
    "NaN": (lambda f: change_tensors(f, lambda t: {n: v / 0 for n, v in t.items()}), "not finite"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_folder_that_does_not_hold_together_is_refused(folder: Path, damage: str) -> None:
    change, words = DAMAGE[damage]
    change(folder)
    with pytest.raises(reftune.ReftuneError, match=words):
        read_folded(folder)


def imported_at_the_top(module: str, seen: set[str]) -> set[str]:
    """Everything that importing a module of the package imports, outside functions and type checking."""
    if module in seen:
        return seen
    seen.add(module)
    path = SOURCE.parent.joinpath(*module.split("."))
    path = path.with_suffix(".py") if path.with_suffix(".py").is_file() else path / "__init__.py"
    if module == "reftune" or not path.is_file():
        return seen
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        found = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        found += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        found += [f"{node.module}.{alias.name}" for alias in node.names] if isinstance(node, ast.ImportFrom) else []
        for name in found:
            imported_at_the_top(name, seen)
    return seen


@pytest.mark.parametrize("module", ["serving.folded", "serving.bank", "engine.row_plan"])
def test_an_inference_engine_can_import_it_without_transformers_or_peft(module: str) -> None:
    found = imported_at_the_top(f"reftune.{module}", set())
    assert "torch" in found and "reftune.engine.positions" in found
    assert not {name.split(".")[0] for name in found} & {"transformers", "peft", "accelerate"}
