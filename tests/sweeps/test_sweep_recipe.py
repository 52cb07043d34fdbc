"""A sweep's YAML: what it means, and what is refused with the field's name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

import reftune
from reftune.sweeps import resolve_sweep
from reftune.sweeps.space import Choices, Range

GOOD: dict[str, Any] = {
    "train_file": "demo", "eval_fraction": 0.1, "epochs": 2, "trials": 7, "timeout": 1.5,
    "search": {"rank": [1, 2], "layers": ["all", 8, [10, 14]], "positions": ["l1", "f7+l7"],
               "lr": {"low": "1e-4", "high": 1e-2, "log": True}},
}  # fmt: skip


def written(folder: Path, **changes: Any) -> Path:
    values = {name: value for name, value in {**GOOD, **changes}.items() if value is not ...}
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_a_recipe_is_read_into_settings_space_and_options(tmp_path: Path):
    sweep = resolve_sweep(written(tmp_path), {"output": "elsewhere", "trials": "9", "epochs": "4"})
    assert (sweep.options.trials, sweep.options.timeout, sweep.options.sampler) == (9, 1.5, "tpe")
    assert (sweep.base.epochs, sweep.base.output, sweep.base.rank) == (4.0, "elsewhere", 1)
    assert sweep.space["layers"] == Choices({"all": "all", 8: 8, "10,14": [10, 14]})
    assert sweep.space["lr"] == Range(1e-4, 1e-2, True, None, False)
    trial = sweep.trial({"layers": [10, 14], "lr": 5e-3}, "out")
    assert (trial.layers, trial.lr, trial.output, trial.epochs) == ([10, 14], 5e-3, "out", 4.0)


def test_the_recipe_that_ships_is_valid():
    sweep = resolve_sweep(Path(__file__).parents[2] / "recipes" / "sweep" / "persona.yaml")
    assert set(sweep.space) == {"rank", "layers", "positions", "lr"} and sweep.base.train_file == "demo"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"search": ...}, "search: name what is varied"),
        ({"search": {}}, "search: name what is varied"),
        ({"search": {"rnk": [1]}}, "unknown key 'rnk'; did you mean rank"),
        ({"search": {"learning_rate": [1e-3]}}, "did you mean lr"),
        ({"search": {"rank": []}}, r"search.rank=\[\]: give at least one value"),
        ({"search": {"rank": 4}}, "search.rank=4: give a list of values"),
        ({"search": {"rank": [1, 0]}}, "search: rank=0: must be at least 1"),
        ({"search": {"rank": [1, 1]}}, "search.rank: 1 is there twice"),
        ({"search": {"positions": ["l1", "x3"]}}, "search: .*x3"),
        ({"search": {"rank": {"low": 4, "high": 2}}}, "search.rank: low=4 must be below high=2"),
        ({"search": {"positions": {"low": "l1", "high": "l2"}}}, "search.positions: only numbers have a range"),
        ({"search": {"output": ["a"]}}, "search.output cannot be searched"),
        ({"search": {"eval_fraction": [0.1]}}, "search.eval_fraction cannot be searched: .*same rows"),
        ({"search": {"seed": [1, 2]}}, "search.seed would change the rows that eval_fraction holds out"),
        ({"rank": 4}, "rank=4 is fixed and searched too"),
        ({"eval_fraction": ...}, "no rows to judge a trial by: give eval_file"),
        ({"trials": 0}, "trials=0: give a whole number of at least 1"),
        ({"timeout": -1}, "timeout=-1: give a number above 0 .minutes"),
        ({"metric": "accuracy"}, "metric='accuracy': choose eval_loss"),
        ({"sampler": "grid"}, "sampler='grid': choose tpe or random"),
        ({"trails": 3}, "unknown key 'trails'; did you mean trials"),
        ({"epochs": 0}, "epochs=0.0: must be above 0"),
        ({"task": "classification"}, "sweeps are for completions"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, changes: dict[str, Any], words: str):
    path = written(tmp_path, **changes)
    with pytest.raises(reftune.ReftuneError, match=words) as error:
        resolve_sweep(path)
    assert str(path) in str(error.value)


def test_held_out_rows_by_flag_replace_those_of_the_recipe(tmp_path: Path):
    rows = tmp_path / "rows.csv"
    rows.write_text("prompt,completion\na,b\n")
    sweep = resolve_sweep(written(tmp_path), {"eval_file": str(rows)})
    assert sweep.base.eval_file == str(rows) and sweep.base.eval_fraction == 0
