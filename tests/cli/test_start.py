"""The command line answers at once: what it can say without torch, transformers and PEFT, it says without them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model

import reftune
from reftune.cli.app import Commands
from reftune.edits import available_edits
from reftune.output.interrupt import interrupt
from reftune.runs.recipe import EDITS
from tests.tiny_models import TINY

HEAVY = ("torch", "transformers", "peft", "datasets", "accelerate", "matplotlib")
_RUN = """
import json, sys
import reftune_command
sys.argv = ["reftune", *json.loads(sys.argv[1])]
try:
    reftune_command.main()
except SystemExit as end:
    status = end.code
print("\\n" + json.dumps([status or 0, sorted(sys.modules)]))
"""


def started(*arguments: str) -> tuple[int, set[str], str]:
    """Exit status, modules that were loaded, and everything printed."""
    ran = subprocess.run(
        [sys.executable, "-c", _RUN, json.dumps(arguments)], capture_output=True, text=True, check=True
    )
    status, modules = json.loads(ran.stdout.splitlines()[-1])
    return status, set(modules), ran.stdout + ran.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["nonsense"]])
def test_the_command_itself_loads_nothing_heavy(arguments: list[str]) -> None:
    status, modules, _ = started(*arguments)
    assert status == (2 if arguments == ["nonsense"] else 0)
    assert "reftune.cli.app" in modules and not modules & set(HEAVY)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_within_an_import_ends_the_process_at_once(number: int, status: int, tmp_path: Path) -> None:
    (tmp_path / "long_import.py").write_text(
        f"import os\ntry:\n    os.kill(os.getpid(), {int(number)})\nfinally:\n    print('late')\n"
    )
    code = (
        "import signal; from reftune.output.interrupt import interrupt\n"
        f"signal.signal({int(number)}, interrupt)\nimport long_import\nprint('too late')"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{os.pathsep.join(sys.path)}"},
        capture_output=True,
    )
    assert (ran.returncode, ran.stdout) == (status, b"")


def test_a_signal_elsewhere_is_a_keyboard_interrupt() -> None:
    with pytest.raises(KeyboardInterrupt):
        interrupt(signal.SIGTERM, sys._getframe())


@pytest.mark.parametrize("command", [command.name for command in Commands.registered if command.name != "lm-eval"])
def test_help_and_a_wrong_flag_of_a_command_load_nothing_heavy(command: str) -> None:
    for flag, expected in (("--help", 0), ("--nonsense", 2)):
        status, modules, said = started(command, flag)
        assert status == expected, said
        assert not modules & set(HEAVY)


@pytest.mark.parametrize(
    "flags", [["--rank", "x"], ["--layers", "x"], ["--positions", "x9"], ["--epochs", "-1"], ["--init", "zero"]]
)
def test_a_wrong_value_is_told_with_nothing_heavy_loaded(flags: list[str]) -> None:
    status, modules, said = started("train", "--train-file", "demo", *flags)
    assert status == 2 and f"{flags[0]}=" in said
    assert not modules & set(HEAVY)


def test_info_reads_an_adapter_with_nothing_heavy_loaded(tmp_path: Path) -> None:
    model = get_peft_model(TINY["llama"](), reftune.ReftConfig(r=2, layers_to_transform=[1], task_type="CAUSAL_LM"))
    model.save_pretrained(str(tmp_path))
    status, modules, said = started("info", str(tmp_path))
    assert status == 0 and "loreft" in said
    assert not modules & set(HEAVY)


def test_the_module_is_the_command_and_loads_nothing_heavy_either() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "reftune", "--version"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == f"reftune {reftune.__version__}"
    loaded = {line.rpartition("|")[2].strip() for line in ran.stderr.splitlines()}
    assert "reftune.cli.app" in loaded and not loaded & set(HEAVY)


def test_where_reftune_is_imported_as_a_library_peft_knows_it_at_once() -> None:
    code = (
        "import reftune, sys; from peft import PeftType; print(PeftType.REFT.value, 'reftune.training' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["REFT", "False"]


def test_every_public_name_is_there_and_a_wrong_one_is_an_attribute_error() -> None:
    assert all(getattr(reftune, name) is not None for name in reftune.__all__)
    assert set(reftune.__all__) <= set(dir(reftune))
    with pytest.raises(AttributeError, match="no_such_name"):
        reftune.no_such_name  # noqa: B018


def test_the_help_names_every_edit_of_the_library() -> None:
    ours = {
        name for name in available_edits() if reftune.edits.edit_class(name).__module__.startswith("reftune.edits.")
    }
    assert set(EDITS) == ours


@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norms_that_info_reads_are_those_of_the_folded_edit(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    from reftune.adapter.info import read_adapter_info

    torch.manual_seed(0)
    options = {"add_bias": True} if name == "noreft" else {}
    config = reftune.ReftConfig(
        method=name, r=2, layers_to_transform=[0], init="paper", task_type="CAUSAL_LM", **options
    )
    model = get_peft_model(TINY["llama"](), config).to(dtype)
    model.save_pretrained(str(tmp_path))
    (edit,) = (module for module in model.modules() if isinstance(module, reftune.Edit))
    (found,) = read_adapter_info(tmp_path).edits
    if not edit.folds:
        assert found.linear_norm is None and found.constant_norm is None
        return
    folded = edit.eval().float().fold()
    rough = 1e-5 if dtype == torch.float32 else 2e-2
    assert found.linear_norm == pytest.approx(float((folded.A @ folded.B).norm()), rel=rough)
    assert found.constant_norm == pytest.approx(float((folded.b @ folded.B).norm()), rel=rough)
