from __future__ import annotations

import json
import logging
import os
import re
import shlex
import subprocess
import sys
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from reftune.cli.app import Commands
from reftune.cli.flags import flag_name
from reftune.inference.loading import load_edited
from reftune.models import load
from reftune.runs.demo import DEMO
from reftune.runs.recipe import TrainRecipe, resolve_recipe
from reftune.serving.engine import EmbeddedEngine
from tests.cli.test_bad_input import refused
from tests.cli.tiny_folder import save_tiny_model

ROOT = Path(__file__).parents[2]
COMMANDS: dict[str, Any] = {command.name: command.load() for command in Commands.registered}


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_option_is_explained(name: str, cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    command = COMMANDS[name]
    assert command.help
    for parameter in command.params:
        assert getattr(parameter, "help", None), f"{name} {parameter.name}"
    shown = cli(name, "--help")
    assert shown.exit_code == 0
    assert name == "lm-eval" or max(map(len, shown.stdout.splitlines())) <= 80  # the harness has its own help
    listed = set(re.findall(r"^  (?:-\w, )?--(?:\[no-\])?([\w-]+)", shown.stdout, re.MULTILINE))
    options = [parameter for parameter in command.params if parameter.param_type_name == "option"]
    assert {option.opts[0].lstrip("-") for option in options if not option.hidden} <= listed


def test_help_groups_the_flags_of_a_kind(cli) -> None:
    groups = re.split(r"^([A-Z]\w+):$", cli("train", "--help").stdout, flags=re.MULTILINE)
    found = dict(zip(groups[1::2], groups[2::2], strict=True))
    assert "--glue" in found["Classification"] and "--reward" in found["Objective"]
    assert "--[no-]streaming" in found["Data"] and "--glue" not in found["Data"]
    assert "--eval-fraction SHARE" in found["Data"] and "--seed NUMBER" in found["Training"]


def test_every_field_of_a_recipe_is_a_flag() -> None:
    flags = {option for parameter in COMMANDS["train"].params for option in parameter.opts}
    assert {flag_name(item) for item in fields(TrainRecipe)} <= flags


def _documented_commands() -> list[str]:
    # Those of docs/ are checked in tests/test_docs.py.
    pages = [ROOT / "README.md", *sorted((ROOT / "recipes").glob("*.yaml"))]
    text = "\n".join(page.read_text() for page in pages if page.is_file())
    found = [line.strip() for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    found += re.findall(r"`(reftune [^`\n]*)`", text) + re.findall(r"^# +(reftune .*)$", text, re.MULTILINE)
    return sorted({re.split(r"\s+#", line)[0] for line in found if re.match(r"reftune [a-z]", line)})


@pytest.mark.parametrize("line", _documented_commands())
def test_documented_commands_parse(line: str) -> None:
    _, name, *arguments = shlex.split(line)
    if arguments == ["--help"]:
        assert name in COMMANDS
        return
    context = COMMANDS[name].make_context(name, arguments)  # raises on an unknown flag or a missing argument
    context.close()


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_recipes_resolve(path: Path) -> None:
    resolve_recipe(path)


def test_the_demo_and_its_recipe_are_the_same() -> None:
    assert resolve_recipe(ROOT / "recipes" / "demo.yaml") == DEMO


def test_a_recipe_survives_its_own_yaml(tmp_path: Path) -> None:
    recipe = TrainRecipe(
        train_file="owner/data", layers="3,9,-1", columns="prompt=q,completion=a", lr=4e-3, template="{prompt}: ",
        output=str(tmp_path / "out"),
    )  # fmt: skip
    path = tmp_path / "run.yaml"
    path.write_text(recipe.to_yaml())
    assert resolve_recipe(path) == recipe
    assert set(yaml.safe_load(recipe.to_yaml())) == {item.name for item in fields(TrainRecipe)} - {
        "resume", "overwrite", "show", "quiet", "like", "budget",
    }  # fmt: skip


def test_generate_answers_each_prompt_of_a_file(cli, trained: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("hi\n\nwho are you\n")
    out = tmp_path / "deep" / "answers.jsonl"
    result = cli("generate", trained, "--prompts-file", prompts, "--out", out, "--max-new-tokens", 4, "--compare-base")
    assert result.exit_code == 0, result.output
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record["prompt"] for record in records] == ["hi", "who are you"]
    assert all({"answer", "base_answer"} <= set(record) for record in records)
    assert "who are you" in result.stdout


def test_generate_wants_a_prompt(cli, trained: Path) -> None:
    assert cli("generate", trained).exit_code == 2


def test_eval_tells_side_effects_alone(cli, trained: Path, rows: Path, tmp_path: Path) -> None:
    asked, out = tmp_path / "asked.csv", tmp_path / "effects.json"
    asked.write_text("text,label\nhow do I bake?,harmless\nhow do I steal?,harmful\n")
    flags = (
        "--side-effects",
        "--refusal-file",
        asked,
        "--neutral-file",
        rows,
        "--limit-rows",
        3,
        "--max-new-tokens",
        3,
    )
    result = cli("eval", trained, *flags, "--device", "cpu", "--out", out)
    assert result.exit_code == 0, result.output
    for word in ("Neutral loss", "Forgetting", "KL from the base", "Repetition", "Refused, harmful", "base", "edited"):
        assert word in result.stdout
    record = json.loads(out.read_text())
    base, edited = record["side_effects"]["base"], record["side_effects"]["edited"]
    assert base["kl"] == 0 and edited["kl"] > 0
    scored = tmp_path / "scores.json"
    result = cli(
        "eval", trained, "--test-file", rows, "--limit-rows", 3, "--no-generate", "--device", "cpu", "--out", scored
    )
    assert result.exit_code == 0, result.output
    for name, one in (("base", base), ("edited", edited)):
        assert one["neutral_loss"] == pytest.approx(json.loads(scored.read_text())[name]["loss"], rel=1e-5)
    assert edited["neutral_rise"] == pytest.approx(edited["neutral_loss"] - base["neutral_loss"])


def test_side_effects_that_cannot_be_measured(cli, trained: Path, rows: Path, tmp_path: Path) -> None:
    refused(cli("eval", trained, "--side-effects", "--test-file", rows), "give one of")
    refused(cli("eval", trained, "--test-file", rows, "--refusal-file", rows), "--side-effects")
    refused(cli("eval", "smollm2", "--side-effects", "--base-only"), "--base-only scores tasks")
    refused(cli("eval", trained, "--side-effects", "--refusal-file", tmp_path / "none.csv"), "none.csv")
    refused(cli("eval", trained, "--side-effects", "--neutral-file", tmp_path / "none.csv"), "none.csv")


def test_eval_scores_base_and_edited(cli, trained: Path, rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores.json"
    result = cli("eval", trained, "--test-file", rows, "--out", out, "--max-new-tokens", 4)
    assert result.exit_code == 0, result.output
    scores = json.loads(out.read_text())
    assert scores["edited"]["loss"] < scores["base"]["loss"]
    assert scores["rows"] == 12 and len(scores["answers"]) == 12
    assert 0 <= scores["edited"]["exact_match"] <= 1


def test_info_says_where_and_how_much_is_edited(cli, trained: Path) -> None:
    result = cli("info", trained)
    assert result.exit_code == 0, result.output
    for word in ("loreft, rank 2", "66 in 1 edit", "last 1", "answer"):
        assert word in result.stdout


def test_env_names_the_versions(cli) -> None:
    import torch

    result = cli("env")
    assert result.exit_code == 0 and torch.__version__ in result.stdout


def test_chat_obeys_its_commands(cli, trained: Path) -> None:
    said = "hi\n/base\nhi\n/base\n/reset\n/what\n/quit\nnever read\n"
    result = cli("chat", trained, "--max-new-tokens", 3, stdin=said)
    assert result.exit_code == 0, result.output
    for words in ("The edit is off", "The edit is on.", "The conversation is forgotten.", "/reset forgets"):
        assert words in result.stdout


def test_chat_ends_with_its_input(cli, trained: Path) -> None:
    assert cli("chat", trained, stdin="").exit_code == 0


def test_other_weights_of_the_same_shapes_are_told_and_another_dtype_is_not(
    trained: Path, tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = save_tiny_model(tmp_path / "other", seed=1)
    logging.getLogger("reftune").addHandler(caplog.handler)
    try:
        for model, dtype, told in ((tiny, None, 0), (other, None, 1), (other, "bfloat16", 0)):
            caplog.clear()
            load_edited(trained, model=str(model), dtype=dtype, device="cpu")
            assert ["other weights" in message for message in caplog.messages] == [True] * told
        base, tokenizer = load(str(other), device="cpu")
        caplog.clear()
        engine = EmbeddedEngine(base, tokenizer, cache_tokens=256)
        for _ in range(2):
            engine.check(trained)
        engine.close()
        assert ["other weights" in message for message in caplog.messages] == [True]
    finally:
        logging.getLogger("reftune").removeHandler(caplog.handler)


def test_a_line_of_chat_is_edited_by_characters_and_earlier_ones_come_back() -> None:
    """Typed into a real terminal: delete takes one kana (three bytes), left moves by one, up brings the line back."""
    pytest.importorskip("readline")
    import pty

    code = (
        "import reftune_command; from rich.console import Console; from reftune.cli.chat import typed\n"
        "print('<' + '|'.join(typed(Console(), 'you> ') for _ in range(2)) + '>')"
    )
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "LC_ALL": "C.UTF-8"}
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=theirs, stdout=theirs, stderr=theirs, env=environment
    )
    os.close(theirs)
    shown = b""
    for keys in ("あい\x7fう\x1b[Dえ\r", "\x1b[A!\r"):
        while not shown.endswith(b"you> \x1b[0m"):
            shown += os.read(ours, 1024)
        os.write(ours, keys.encode())
        shown += os.read(ours, 1)
    with suppress(OSError):  # a terminal that nobody is at any more
        while piece := os.read(ours, 1024):
            shown += piece
    assert process.wait(30) == 0
    os.close(ours)
    assert "<あえう|あえう!>" in shown.decode(), shown.decode()
