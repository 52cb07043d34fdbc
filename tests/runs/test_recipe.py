from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import pytest

from reftune.errors import ReftuneError
from reftune.inference.settings import BaseModel, GenerationSettings
from reftune.runs.recipe import TrainRecipe, recipe_fields, resolve_recipe
from reftune.runs.recipe_values import read_columns, read_flags, read_layers, typed_fields
from reftune.serving.settings import ServerSettings
from reftune.steering.settings import SteerSettings


@pytest.mark.parametrize(
    ("text", "layers"), [("8", 8), (8, 8), ("3,9, 18", [3, 9, 18]), ("-1", -1), ("ALL", "all"), ([0, -1], [0, -1])]
)
def test_layers_are_read_as_people_write_them(text: object, layers: object) -> None:
    assert read_layers(text) == layers


@pytest.mark.parametrize("text", ["", "a", "3,,4", True, [1.5], "1-3"])
def test_layers_that_are_none_are_refused(text: object) -> None:
    with pytest.raises(ReftuneError, match="layers="):
        read_layers(text)


def test_columns_are_pairs() -> None:
    assert read_columns("prompt=question, completion=answer") == {"prompt": "question", "completion": "answer"}
    with pytest.raises(ReftuneError, match="field=column"):
        read_columns("question")


def test_what_yaml_reads_otherwise_than_people_write_is_understood(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("train_file: x.csv\nlr: 4e-3\nepochs: 2\nquantization: 8\nprefix_reuse: off\n")
    recipe = resolve_recipe(path)
    assert (recipe.lr, recipe.epochs, recipe.quantization, recipe.prefix_reuse) == (4e-3, 2.0, "8bit", "off")


def test_a_folder_stands_for_its_run_yaml(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("train_file: x.csv\nrank: 7\n")
    assert resolve_recipe(tmp_path).rank == 7


def test_a_flag_for_held_out_rows_replaces_the_other_kind_in_the_recipe(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("train_file: x.csv\neval_fraction: 0.1\n")
    assert resolve_recipe(path, {"eval_file": "y.csv"}).eval_fraction == 0.0


def test_a_flag_for_the_warm_up_replaces_the_other_kind_in_the_recipe(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("train_file: x.csv\nwarmup_ratio: 0.1\n")
    recipe = resolve_recipe(path, {"warmup_steps": "100"})
    assert (recipe.warmup_steps, recipe.warmup_ratio) == (100, 0.0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train_file: x.csv\nwarmup_ratio: 0.1\nwarmup_steps: 5\n", "warmup_steps=5: warmup_ratio=0.1 is given too"),
        ("train_file: x.csv\noptimizer: adamw\n", "optimizer='adamw': choose one of .*adamw_"),
        ("train_file: x.csv\nrnak: 4\n", "unknown key 'rnak'; did you mean rank"),
        ("train_file: x.csv\nr: 4\n", "did you mean rank?"),
        ("train_file: x.csv\nbatch-size: 4\n", "did you mean batch_size?"),
        ("train_file: x.csv\nrank: many\n", "recipe.yaml: rank='many': give a whole number"),
        ("train_file: x.csv\nrank: 2.5\n", "rank=2.5: give a whole number"),
        ("train_file: x.csv\ntensorboard: maybe\n", "tensorboard='maybe': write true or false"),
        ("train_file: x.csv\nrank:\n", "rank=null"),
        ("train_file: [x.csv]\n", "train_file=.*give text"),
        ("- a\n", "holds a list"),
        ("a: [\n", "is not YAML"),
    ],
)
def test_a_wrong_recipe_is_told_by_file_and_key(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ReftuneError, match=words):
        resolve_recipe(path)


@pytest.mark.parametrize("owner", [TrainRecipe, GenerationSettings, BaseModel, ServerSettings, SteerSettings])
@pytest.mark.parametrize("value", ["1e30", "inf", "-inf", "nan"])
def test_a_number_past_its_bounds_is_told_the_bound_and_no_other_value_passes(owner: Any, value: str) -> None:
    own = {"train_file": "x.csv"} if owner is TrainRecipe else {}
    for item, kind in typed_fields(owner):
        if float not in (kind, *get_args(kind)) and int not in (kind, *get_args(kind)):
            continue
        if item.name in ("layers", "factors"):
            continue  # lists too, which have readers of their own
        with pytest.raises(ReftuneError, match=rf"^(--)?{item.name.replace('_', '.')}=") as raised:
            read_flags(owner, {**own, item.name: value})
        whole, told = float not in (kind, *get_args(kind)), str(raised.value)
        if value == "nan" or (whole and "inf" in value):
            assert "give a" in told, told
        else:
            bounds = "at (most|least)|below|above|between|million|not go with|has no meaning|is of many users"
            assert re.search(bounds, told), told


def test_the_word_that_stands_for_a_number_is_told() -> None:
    with pytest.raises(ReftuneError, match="give a whole number of rows or auto"):
        TrainRecipe(train_file="x.csv", batch_size="many")
    with pytest.raises(ReftuneError, match=r"8/32 the one as deep as 8 is of 32 \(0/32 to 31/32\)"):
        TrainRecipe(train_file="x.csv", layers="32/32")


def test_a_missing_recipe_names_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("")
    with pytest.raises(ReftuneError, match="near it: recipe.yaml"):
        resolve_recipe(tmp_path / "recipes.yaml")


def test_every_field_has_help_and_a_group() -> None:
    for item in recipe_fields():
        assert item.metadata["help"].endswith("."), item.name
        groups = {"Data", "Model", "Adapter", "Training", "Objective", "Classification", "Users", "Output"}
        assert item.metadata["group"] in groups


def test_the_adapter_is_what_the_recipe_says() -> None:
    config = TrainRecipe(
        train_file="x", method="loreft", layers="2,5", rank=3, positions="F2+L3", act_fn="relu", init="paper",
        parametrization="householder",
    ).adapter_config()  # fmt: skip
    assert (config.r, config.layers_to_transform, config.positions, config.act_fn) == (3, [2, 5], "f2+l3", "relu")
    assert (config.init, config.parametrization) == ("paper", "householder")
