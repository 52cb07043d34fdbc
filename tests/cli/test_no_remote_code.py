"""No code of a model's repository is ever run, and nobody is asked whether it may be."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.tiny_folder import save_tiny_model, write_rows

SOURCE = Path(__file__).parents[2] / "src" / "reftune"
_OURS = {"PeftModel", "PeftConfig", "ReftConfig", "AdapterConfig", "self", "cls", "super"}
"""What loads an adapter, which is data, and takes no such argument."""


def loading_calls() -> list[tuple[str, ast.Call]]:
    found = []
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            owner = node.func.value
            owner = owner.func if isinstance(owner, ast.Call) else owner  # super()
            named = isinstance(owner, ast.Name) and owner.id in _OURS
            if node.func.attr in ("from_pretrained", "from_config") and not named:
                found.append((f"{path.relative_to(SOURCE)}:{node.lineno}", node))
    return found


def test_every_loading_call_refuses_remote_code() -> None:
    calls = loading_calls()
    assert len(calls) >= 7
    for where, call in calls:
        if call.args and isinstance(call.args[0], ast.Constant) and call.args[0].value is None:
            continue  # made of a configuration and tensors in memory: a class that is loaded already
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        value = given.get("trust_remote_code")
        assert isinstance(value, ast.Constant) and value.value is False, where


@pytest.fixture
def hostile(tmp_path: Path) -> tuple[Path, Path]:
    """A base folder that asks for code of its own, and the file that the code would leave."""
    folder, mark = save_tiny_model(tmp_path / "hostile"), tmp_path / "code-was-run"
    code = f"open({str(mark)!r}, 'w').write('run')\nclass Own: pass\nOwnConfig = OwnModel = OwnTokenizer = Own\n"
    (folder / "own.py").write_text(code)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "of_its_own",
        "architectures": ["OwnModel"],
        "auto_map": {
            "AutoConfig": "own.OwnConfig",
            "AutoModelForCausalLM": "own.OwnModel",
            "AutoModelForSequenceClassification": "own.OwnModel",
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    words = json.loads((folder / "tokenizer_config.json").read_text())
    words |= {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(words))
    return folder, mark


@pytest.mark.parametrize(
    "command", ["train", "classification", "generate", "chat", "eval", "base", "compare", "sweep", "import"]
)
def test_a_hostile_base_is_refused_and_its_code_is_not_run(
    command: str, hostile: tuple[Path, Path], tmp_path: Path, cli: Any, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, mark = hostile
    rows, out = write_rows(tmp_path / "rows.csv"), tmp_path / "out"
    recipe = tmp_path / "recipe.yaml"
    common = f"train_file: {rows}\nmodel: {model}\noutput: {out}\neval_fraction: 0.25\ndevice: cpu\n"
    more = {"compare": "methods: {a: {method: loreft, layers: 0}}\n", "sweep": "search: {rank: [1, 2]}\nlayers: 0\n"}
    if command == "classification":
        rows.write_text("text,label\n" + "".join(f"it is {n},{'yes' if n % 2 else 'no'}\n" for n in range(8)))
        common += "task: classification\n"
    recipe.write_text(common + more.get(command, ""))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    arguments = {
        "train": ["train", recipe], "classification": ["train", recipe],
        "generate": ["generate", trained, "--model", model, "--prompt", "hi"],
        "chat": ["chat", trained, "--model", model],
        "eval": ["eval", trained, "--model", model, "--test-file", rows],
        "base": ["eval", model, "--base-only", "--task", "boolq", "--data", rows],
        "compare": ["compare", recipe, "--in-process"], "sweep": ["sweep", recipe],
        "import": ["import-pyreft", Path(__file__).parents[1] / "pyreft" / "golden" / "direft", "--output", out, "--model", model],
    }[command]  # fmt: skip
    result = cli(*arguments, stdin="y\ny\n")
    assert result.exit_code == 2, result.output + repr(result.exception)
    assert "Traceback" not in result.stderr and "[y/N]" not in result.output
    assert not mark.exists() and not out.exists()
