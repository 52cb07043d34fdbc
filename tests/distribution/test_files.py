"""What a wheel and an sdist hold. `make dist` installs the wheel as well: installed.py."""

from __future__ import annotations

import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    (path,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path_factory.mktemp("dist")), versions=["standard"])
    return zipfile.ZipFile(path)


def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    source = ROOT / "src"
    wanted = {
        str(path.relative_to(source))
        for path in source.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not path.parent.name.endswith(".egg-info")
    }
    assert {name for name in wheel.namelist() if ".dist-info/" not in name} == wanted
    assert {
        "reftune/py.typed", "reftune/serving/page/index.html", "reftune/serving/page/page.js",
        "reftune/serving/page/page.css", "reftune/runs/templates/README.md.j2", "reftune/data/demo_persona.jsonl",
    } <= wanted  # fmt: skip


def test_the_wheel_names_its_licence_and_commands(wheel: zipfile.ZipFile) -> None:
    (folder,) = {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
    metadata = Parser().parsestr(wheel.read(f"{folder}/METADATA").decode())
    assert metadata["Name"] == "reftune" and metadata["License-Expression"] == "Apache-2.0"
    assert f"{folder}/licenses/LICENSE" in wheel.namelist()
    entries = wheel.read(f"{folder}/entry_points.txt").decode()
    assert "[console_scripts]\nreftune = reftune_command:main" in entries
    assert "[vllm.general_plugins]\nreftune = " in entries


def test_the_sdist_holds_what_its_tests_and_pages_read() -> None:
    held = {Path(file.relative_path) for file in SdistBuilder(str(ROOT)).recurse_included_files()}
    for name in ("src/reftune/py.typed", "Makefile", "constraints.txt", "mkdocs.yml", "LICENSE", "tests/conftest.py"):
        assert Path(name) in held
    for folder in ("benchmarks", "docs", "examples", "notebooks", "recipes"):
        assert any(path.parts[0] == folder for path in held), folder
