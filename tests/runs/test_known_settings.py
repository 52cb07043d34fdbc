"""Defaults, `--like` and `--budget`, what is fitted to a model and its rows, and the plan that is printed."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import TrainerControl, TrainerState

from reftune.errors import ReftuneError
from reftune.models import load
from reftune.runs.known_settings import KNOWN, learning_rate, rows_of_a_pass
from reftune.runs.plan import Plan
from reftune.runs.recipe import TrainRecipe, recipe_fields, resolve_recipe
from tests.cli.tiny_folder import save_tiny_model


def settings(recipe: TrainRecipe) -> tuple[Any, ...]:
    return recipe.method, recipe.rank, recipe.layers, recipe.positions, recipe.lr


def test_a_recipe_of_rows_alone_is_the_best_setting_known() -> None:
    assert settings(TrainRecipe(train_file="x")) == ("direft", 1, "all", "l1+generated", "auto")
    classifier = TrainRecipe(train_file="x", task="classification")
    assert settings(classifier) == ("loreft", 1, "all", "f3", 4e-3)


def test_help_says_the_defaults_that_a_recipe_has() -> None:
    recipe, classifier = TrainRecipe(train_file="x"), TrainRecipe(train_file="x", task="classification")
    told = {item.name: item.metadata["help"] for item in recipe_fields()}
    for name in ("method", "rank", "layers", "positions"):
        own, other = getattr(recipe, name), getattr(classifier, name)
        said = f"default: {own}" + ("" if own == other else f", or {other} for classification") + "."
        assert told[name].endswith(said), name
    assert f"for classification {classifier.lr:g}" in told["lr"]
    for dial, words in KNOWN.items():
        assert set(words) <= set(re.findall(r"\w+", told[dial]))


@pytest.mark.parametrize(("dial", "word"), [(dial, word) for dial, words in KNOWN.items() for word in words])
def test_a_dial_sets_what_is_not_given_itself(dial: str, word: str) -> None:
    known = KNOWN[dial][word]
    recipe = resolve_recipe(None, {"train_file": "x", dial: word})
    assert {name: getattr(recipe, name) for name in known} == known
    assert resolve_recipe(None, {"train_file": "x", dial: word, "rank": "5"}).rank == 5


def test_a_flag_turns_a_dial_over_the_recipes_own_keys(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("train_file: x\nlike: blog\nrank: 2\npositions: l3\nlr: 1e-3\n")
    assert settings(resolve_recipe(path)) == ("loreft", 2, "8/32", "l3", 1e-3)
    assert settings(resolve_recipe(path, {"budget": "full"})) == ("direft", 8, "all", "all", 1e-3)
    with pytest.raises(ReftuneError, match="like and budget"):
        resolve_recipe(None, {"train_file": "x", "like": "blog", "budget": "tiny"})
    with pytest.raises(ReftuneError, match="no meaning for task='classification'"):
        TrainRecipe(train_file="x", task="classification", budget="tiny")


@pytest.mark.parametrize("layers", ["8/0", "9/8", "8/8", "a/32", "8/-1", "1/2/3"])
def test_a_place_that_is_none_is_refused(layers: str) -> None:
    with pytest.raises(ReftuneError, match="layers="):
        TrainRecipe(train_file="x", layers=layers)


def test_places_are_as_deep_in_every_model(tmp_path: Path) -> None:
    model, _ = load(str(save_tiny_model(tmp_path / "tiny", layers=6)))
    for written, layers in (("8/32", 2), ("0/32,16/32,31/32", [0, 3, 5]), ("1/2,-1", [3, -1]), ("8/32,9/32", 2)):
        assert TrainRecipe(train_file="x", layers=written).fitted(model).layers == layers
    with pytest.raises(ReftuneError, match=r"^layers=\[40\]: this model has 6 layers"):
        TrainRecipe(train_file="x", layers=40).fitted(model, {"input_ids": [[1]], "labels": [[1]]})


def test_the_rate_goes_through_what_is_known() -> None:
    assert learning_rate(4096, 8, 32, 300.0) == 9e-4 and learning_rate(4096, 8, 32, 3e3) <= 1.2e-3  # the paper, 7B
    assert 4e-3 <= learning_rate(4096, 4, 1, 300.0) <= 6e-3  # one layer of a model of 8B
    assert 4e-3 <= learning_rate(576, 1, 30, 179.0) <= 8e-3  # QUALITY.md: persona, worked steps, short answers
    assert 6e-3 <= learning_rate(576, 1, 30, 536.0) <= 10e-3
    assert 1e-3 <= learning_rate(576, 1, 30, 42.0) <= 3e-3
    assert learning_rate(16, 1, 1, 1e6) == 1.5e-2


def test_a_higher_rank_takes_smaller_steps() -> None:
    """Of 1, 4, 16 and 64 the best rates fall by two from each to the next (docs/decisions/0015)."""
    rates = [learning_rate(256, rank, 32, 300.0) for rank in (1, 4, 16, 64)]
    assert [high / low for high, low in zip(rates, rates[1:], strict=False)] == pytest.approx([2.0] * 3, rel=0.05)


@pytest.mark.parametrize(("together", "longest", "tokens"), [(8, 100, 10_000), (8, 100, 500), (12, 7, 60), (8, 900, 5)])
def test_rows_of_a_pass_divide_the_step_and_fit(together: int, longest: int, tokens: int) -> None:
    fit = [n for n in range(1, together + 1) if together % n == 0 and n * longest <= tokens]
    assert rows_of_a_pass(together, longest, tokens) == max(fit, default=1)


def test_a_rise_of_the_held_out_loss_is_told_once() -> None:
    recipe = TrainRecipe(train_file="x", quiet=True)
    console = Console(record=True, width=300, file=io.StringIO())
    plan, state = Plan(recipe, None, None, None, console), TrainerState(is_world_process_zero=True)
    for epoch, loss in enumerate([3.0, 2.0, 2.5, 2.75], start=1):
        state.log_history.append({"eval_loss": loss, "epoch": float(epoch)})
        plan.on_evaluate(None, state, TrainerControl())
    told = console.export_text()
    assert told.count("Held-out loss rose") == 1 and "2.5000 in epoch 3" in told and "2.0000, epoch 2" in told
