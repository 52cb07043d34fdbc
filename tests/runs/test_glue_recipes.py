"""The GLUE recipes: every one has the paper's settings, and each task's trains on rows in GLUE's columns."""

from __future__ import annotations

from pathlib import Path

import pytest

from reftune.data.glue import GLUE
from reftune.runs import run_training
from reftune.runs.recipe import resolve_recipe
from tests.tiny_classifier import glue_rows, save_tiny_encoder, write_jsonl

RECIPES = Path(__file__).parents[2] / "recipes" / "glue"
# learning rate (1e-4), dropout, warm-up, epochs: the paper's tables of hyperparameters for GLUE
PAPER = {
    "base": {
        "mnli": (6, 0.05, 0.06, 40), "sst2": (6, 0.1, 0.1, 40), "mrpc": (3, 0.05, 0, 40), "cola": (4, 0.2, 0.005, 60),
        "qnli": (9, 0.05, 0.1, 20), "qqp": (6, 0.05, 0, 40), "rte": (9, 0.05, 0, 60), "stsb": (6, 0.05, 0.03, 60),
    },
    "large": {
        "mnli": (6, 0.05, 0, 20), "sst2": (6, 0.05, 0.1, 20), "mrpc": (3, 0.2, 0.06, 30), "cola": (1, 0.2, 0.2, 30),
        "qnli": (9, 0.05, 0.1, 20), "qqp": (6, 0.05, 0.06, 20), "rte": (6, 0.05, 0, 30), "stsb": (8, 0.05, 0.2, 30),
    },
}  # fmt: skip
POSITIONS = dict(zip(GLUE, ("f1", "f3", "f3", "f3", "f11", "f11", "f3", "f3"), strict=True))


@pytest.mark.parametrize("size", PAPER)
@pytest.mark.parametrize("task", GLUE)
def test_a_recipe_has_the_papers_settings(size: str, task: str) -> None:
    path = RECIPES / size / f"{task}.yaml"
    recipe = resolve_recipe(path)
    lr, dropout, warmup, epochs = PAPER[size][task]
    assert recipe.lr == pytest.approx(lr * 1e-4)
    assert (recipe.dropout, recipe.warmup_ratio, recipe.epochs) == (dropout, warmup, epochs)
    assert (recipe.method, recipe.rank, recipe.layers, recipe.positions) == ("loreft", 1, "all", POSITIONS[task])
    assert (recipe.batch_size, recipe.max_length, recipe.weight_decay, recipe.schedule) == (32, 256, 0, "linear")
    assert (recipe.glue, recipe.train_file, recipe.split_eval) == (task, f"nyu-mll/glue:{task}", True)
    assert recipe.model == f"FacebookAI/roberta-{size}"
    assert recipe.adapter_config(["classifier"]).task_type == "SEQ_CLS"
    assert {"base": "84.2", "large": "88.2"}[size] in path.read_text(encoding="utf-8")


def test_no_recipe_is_without_a_test() -> None:
    assert sorted(str(path.relative_to(RECIPES)) for path in RECIPES.rglob("*.yaml")) == sorted(
        f"{size}/{task}.yaml" for size in PAPER for task in GLUE
    )


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_encoder(tmp_path_factory.mktemp("models") / "roberta")


@pytest.mark.parametrize("task", GLUE)
def test_a_recipe_trains_and_tests_on_local_rows(task: str, encoder: Path, tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", glue_rows(task, 12))
    held_out = write_jsonl(tmp_path / "validation.jsonl", glue_rows(task, 14, named=True))
    flags = {
        "train_file": str(train), "eval_file": str(held_out), "model": str(encoder), "epochs": 1, "batch_size": 6,
        "device": "cpu", "tensorboard": False, "output": str(tmp_path / "out"),
    }  # fmt: skip
    if task == "mnli":
        flags["test_file"] = str(held_out)
    run = run_training(resolve_recipe(RECIPES / "base" / f"{task}.yaml", flags))
    assert run.metrics["steps"] == 2
    wanted = {"combined", *GLUE[task].metrics} if len(GLUE[task].metrics) > 1 else set(GLUE[task].metrics)
    assert set(run.metrics["test"]["metrics"]) == wanted
    assert ("test_mismatched" in run.metrics) == (task == "mnli")
    assert (run.metrics["validation"]["rows"], run.metrics["test"]["rows"]) == (7, 7)
    assert (run.folder / "test_predictions.jsonl").is_file()
