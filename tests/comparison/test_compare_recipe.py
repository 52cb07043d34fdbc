from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from reftune.comparison import resolve_comparison
from reftune.errors import ReftuneError

Written = Callable[..., dict[str, Any]]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"epoch": 3}, "unknown key 'epoch'; did you mean epochs?"),
        ({"max_seq_length": 64}, "did you mean max_length?"),
        ({"rank": 4}, "'rank' belongs to a method"),
        ({"resume": True}, "'resume' is a key of one training run"),
        ({"eval_fraction": 0.0}, "held-out rows"),
        ({"methods": {}}, "at least one"),
        ({"methods": {"a": {"method": "lorefft"}}}, "methods: a: unknown method 'lorefft'; did you mean loreft"),
        ({"methods": {"a": {"method": "lora", "ranks": 4}}}, "methods: a: unknown key 'ranks'; did you mean rank"),
        ({"methods": {"a": {"method": "lora", "lora_alpha": 4}}}, "did you mean alpha?"),
        ({"methods": {"a": {"method": "lora", "positions": "l1"}}}, "unknown key 'positions'"),
        ({"methods": {"a": {"method": "loreft", "epochs": 9}}}, "'epochs' is shared by all methods"),
        ({"methods": {"a": {"method": "loreft", "positions": "q1"}}}, "methods: a: "),
        ({"methods": {"a": {"method": "lora", "rank": 0}}}, "rank=0: give a whole number of at least 1"),
        ({"methods": {"a": {"method": "loreft+lora"}}}, "such as lora+loreft"),
        ({"methods": {"a": {"method": "base", "lr": 1e-3}}}, "unknown key 'lr'"),
        ({"methods": {"a b": "base", "a-b": "full"}}, "names that differ more"),
        ({"seeds": [0, 0]}, "seeds=[0, 0]"),
        ({"generate": -2}, "generate=-2"),
        ({"judge_by": "luck"}, "choose final or best"),
        ({"reference": "LoRa"}, "reference: unknown method 'LoRa'; did you mean LoRA"),
        ({"options": "nowhere.jsonl"}, "there is no such file"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
    ],
)  # fmt: skip
def test_a_wrong_recipe_says_what_is_wrong_and_the_way_out(
    written: Written, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    with pytest.raises(ReftuneError) as error:
        resolve_comparison({**written(tmp_path), **change})
    assert said in str(error.value)


def test_the_reference_is_the_first_lora_and_rates_have_defaults(written: Written, tmp_path: Path) -> None:
    methods = {"a": "loreft", "b": {"method": "lora"}, "c": {"method": "lora", "rank": 1}, "full": "full"}
    recipe = resolve_comparison(written(tmp_path, methods))
    assert recipe.reference == "b"
    assert [method.train.lr for method in recipe.methods] == ["auto", 1e-3, 1e-3, 5e-5]
    shared = resolve_comparison({**written(tmp_path, methods), "lr": 1e-2})
    assert {method.train.lr for method in shared.methods} == {1e-2}


def test_a_pair_takes_plain_keys_for_its_edit_and_named_ones_for_lora(written: Written, tmp_path: Path) -> None:
    pair = {"method": "dora+direft", "rank": 3, "lora_rank": 5, "positions": "f1+l1"}
    method = resolve_comparison(written(tmp_path, {"x": pair})).methods[0]
    assert (method.train.method, method.train.rank, method.train.positions) == ("direft", 3, "f1+l1")
    assert (method.options["rank"], method.options["alpha"], method.weights) == (5, 10.0, "dora")


def test_the_written_recipe_reads_as_the_same_comparison(written: Written, tmp_path: Path, monkeypatch) -> None:
    recipe = resolve_comparison(written(tmp_path / "out", seeds=[3, 4]))
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "comparison.yaml").write_text(recipe.to_yaml())
    monkeypatch.chdir(folder)
    again = resolve_comparison(folder)
    assert [m.settings() for m in again.methods] == [m.settings() for m in recipe.methods]
    assert again.runs() and [seed for _, seed in again.runs()] == [seed for _, seed in recipe.runs()]
    assert again.folder == recipe.folder.resolve()


def test_the_base_model_is_evaluated_once(written: Written, tmp_path: Path) -> None:
    recipe = resolve_comparison(written(tmp_path, {"base": "base", "LoRA": "lora"}, seeds=[0, 1, 2]))
    assert [(m.name, seed) for m, seed in recipe.runs()] == [("base", 0), ("LoRA", 0), ("LoRA", 1), ("LoRA", 2)]


@pytest.mark.parametrize("name", ["persona", "long_prompts"])
def test_the_shipped_recipes_are_whole(name: str) -> None:
    path = Path(__file__).parents[2] / "recipes" / "compare" / f"{name}.yaml"
    recipe = resolve_comparison(path)
    assert recipe.reference == "LoRA r8"
    assert len(recipe.seeds) == 3
    assert set(yaml.safe_load(path.read_text())["methods"]) == {method.name for method in recipe.methods}
