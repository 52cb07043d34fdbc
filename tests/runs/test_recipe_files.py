from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from reftune.cli import app
from reftune.errors import ReftuneError
from reftune.evaluation.tasks import TASKS
from reftune.runs.recipe import recipe_fields, resolve_recipe
from reftune.runs.recipe_values import read_yaml
from reftune.runs.steps import training_arguments
from tests.cli.tiny_folder import save_tiny_model

RECIPES = Path(__file__).parents[2] / "recipes"
OTHER_SCHEMAS = {"compare", "sweep"}
FILES = [path for path in sorted(RECIPES.rglob("*.yaml")) if path.relative_to(RECIPES).parts[0] not in OTHER_SCHEMAS]
PAPER = sorted((RECIPES / "paper").glob("*.yaml"))
OFFLINE = [path for path in sorted((RECIPES / "offline").glob("*.yaml")) if path.name != "classification.yaml"]
GROUPS = {"commonsense", "arithmetic"}


def name(path: Path) -> str:
    return path.relative_to(RECIPES).as_posix()


def header(path: Path) -> list[str]:
    """The comment at the top, a line each, without its marks."""
    lines = path.read_text(encoding="utf-8").splitlines()
    end = next(index for index, line in enumerate(lines) if not line.startswith("#"))
    return [line.lstrip("# ") for line in lines[:end]]


@pytest.mark.parametrize("path", FILES, ids=name)
def test_every_recipe_is_one(path: Path) -> None:
    missing = {} if "train_file" in read_yaml(path) or "glue" in read_yaml(path) else {"train_file": "rows.json"}
    resolve_recipe(path, missing)


@pytest.mark.parametrize("path", [*PAPER, *OFFLINE, RECIPES / "seed_script.yaml"], ids=name)
def test_every_recipe_says_what_it_stands_for_and_how_it_is_run(path: Path) -> None:
    text = " ".join(header(path))
    assert re.search(r"\(arXiv 2404\.03592, the table of .*?\d\d\.\d|no number of the paper", text)
    commands = [shlex.split(line) for line in header(path) if line.startswith("reftune ")]
    assert ["reftune", "train", f"recipes/{name(path)}"] in [command[:3] for command in commands]
    evaluations = [command for command in commands if command[1] == "eval"]
    assert evaluations
    known = {f"--{item.name.replace('_', '-')}" for item in recipe_fields()}
    for command in commands:
        if command[1] == "train":
            assert {part for part in command if part.startswith("--")} <= known
        else:
            assert command[2] == read_yaml(path)["output"]
        if "--task" in command:
            assert set(command[command.index("--task") + 1].split(",")) <= set(TASKS) | GROUPS


@pytest.mark.parametrize(
    ("file", "percent"), [("commonsense", 0.031), ("commonsense_direft", 0.031), ("math", 0.031), ("instruct", 0.0039)]
)
def test_the_paper_s_parameter_shares_come_out(file: str, percent: float) -> None:
    with torch.device("meta"):
        base = LlamaForCausalLM(LlamaConfig())  # its defaults are LLaMA-7B's sizes
    total = sum(parameter.numel() for parameter in base.parameters())
    model = get_peft_model(base, resolve_recipe(RECIPES / "paper" / f"{file}.yaml").adapter_config())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert 100 * trained / total == pytest.approx(percent, rel=0.02)


def test_the_seed_script_s_schedule_reaches_the_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = resolve_recipe(RECIPES / "seed_script.yaml")
    with pytest.raises(ReftuneError, match="optimizer='paged_adamw_32bit' needs bitsandbytes"):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        training_arguments(recipe, tmp_path, rows=20, evaluates=False)
    monkeypatch.undo()
    flags = {"optimizer": "adamw_torch", "device": "cpu", "tensorboard": False}
    arguments = training_arguments(
        resolve_recipe(RECIPES / "seed_script.yaml", flags), tmp_path, rows=20, evaluates=False
    )
    assert arguments.warmup_steps == 100 and arguments.get_warmup_steps(1000) == 100
    assert (arguments.optim, arguments.lr_scheduler_type) == ("adamw_torch", "cosine")
    assert arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps == 32


@pytest.fixture(scope="module")
def base_of_thirty_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As many layers as the bundled model has, so that the recipes' layers exist."""
    return save_tiny_model(tmp_path_factory.mktemp("recipes") / "base", layers=30)


@pytest.fixture(scope="module")
def adapters_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows in the format of LLM-Adapters."""
    rows = [
        {"instruction": f"What is {a} + {a}?", "input": "", "output": f"the correct answer is {2 * a}", "answer": 2 * a}
        for a in range(12)
    ]
    path = tmp_path_factory.mktemp("recipes") / "rows.json"
    path.write_text(json.dumps(rows))
    return path


@pytest.mark.parametrize("path", OFFLINE, ids=name)
def test_every_offline_recipe_trains(
    path: Path, base_of_thirty_layers: Path, adapters_file: Path, tmp_path: Path
) -> None:
    own = "train_file" in read_yaml(path)
    arguments = [
        "train", str(path), "--model", str(base_of_thirty_layers), "--limit-rows", "8", "--epochs", "1",
        "--output", str(tmp_path / "out"), "--device", "cpu", "--no-tensorboard",
        *([] if own else ["--train-file", str(adapters_file)]),
    ]  # fmt: skip
    outcome = CliRunner().invoke(app, arguments)
    assert outcome.exit_code == 0, outcome.output
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["train_loss"] > 0
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_an_offline_recipe_without_rows_says_what_to_give() -> None:
    outcome = CliRunner().invoke(app, ["train", str(RECIPES / "offline" / "arithmetic.yaml")])
    assert outcome.exit_code == 2
    assert "give --train-file FILE" in outcome.stderr
