import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from reftune import ReftuneError
from reftune.cli.app import app
from reftune.serving.vllm import launch
from reftune.users.store import import_folder
from tests.serving.vllm.cases import Cases


@pytest.fixture(autouse=True)
def a_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(launch, "_command", lambda: "/bin/vllm")
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)


def flags(command: list[str]) -> dict[str, str]:
    return {flag: value for flag, value in zip(command, [*command[1:], ""], strict=True) if flag.startswith("--")}


def test_the_command_names_model_address_and_room_for_the_adapters(written: Cases, tmp_path: Path) -> None:
    for name in ("l1", "all_orthogonal"):
        shutil.copytree(written.adapter(name), tmp_path / name)
    command, environment = launch.command_line(written.model, [tmp_path], 8000, "127.0.0.1", ["--dtype", "float32"])
    found = flags(command)
    assert command[:3] == ["/bin/vllm", "serve", written.model] and command[-2:] == ["--dtype", "float32"]
    assert "--enable-lora" in command and found["--lora-target-modules"] == "none" and found["--port"] == "8000"
    assert json.loads(found["--additional-config"]) == {"reftune": {"rank": 8, "untied": False}}
    assert environment["REFTUNE_ADAPTERS"] == str(tmp_path)
    assert environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"
    assert "reftune" in environment["VLLM_PLUGINS"].split(",")


def test_a_lora_adapter_among_them_leaves_the_linear_layers_wrapped(written: Cases) -> None:
    found = flags(launch.command_line(written.model, [written.folder / "adapters"], 1, "::1")[0])
    assert "--lora-target-modules" not in found and found["--max-lora-rank"] == "8"
    assert json.loads(found["--additional-config"])["reftune"]["untied"] is True


def test_the_users_of_a_store_get_slots_and_their_store_is_served(written: Cases, tmp_path: Path) -> None:
    store = import_folder(tmp_path / "users", written.adapter("l1"), "anna")
    tensors = store.read("anna")
    store.write({f"user {n}": tensors for n in range(40)})
    assert launch.unservable_adapter([store.path]) is None
    command, environment = launch.command_line(written.model, [store.path], 1, "::1")
    found = flags(command)
    assert found["--lora-target-modules"] == "none" and 41 <= int(found["--max-loras"]) <= 64
    assert environment["REFTUNE_ADAPTERS"] == str(store.path)


def test_flags_of_the_caller_win(written: Cases, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    command, environment = launch.command_line(
        written.model, [written.adapter("l1")], 1, "localhost", ["--max-loras=2", "--max_cpu_loras", "3"]
    )
    assert not {"--max-loras", "--max-cpu-loras"} & set(command) and "--max-loras=2" in command
    assert environment["VLLM_PLUGINS"] == "other,reftune"


@pytest.mark.parametrize("extra", [["--no-enable-lora"], ["--api-server-count", "2"], ["--api_server_count=4"]])
def test_flags_that_would_mix_adapters_up_are_refused(extra: list[str], written: Cases) -> None:
    with pytest.raises(ReftuneError, match="one id to different adapters"):
        launch.command_line(written.model, [], 1, "localhost", extra)


@pytest.mark.parametrize(
    "extra", [["--speculative-config", "{}"], ["--kv_transfer_config={}"], ["--enable-dbo"], ["--ubatch-size", "2"]]
)
def test_flags_with_which_no_engine_would_start_are_refused_at_once(extra: list[str], written: Cases) -> None:
    with pytest.raises(ReftuneError, match=f"^{extra[0].split('=')[0].replace('_', '-')}: .*Leave it out"):
        launch.command_line(written.model, [], 1, "localhost", extra)


def test_other_machines_reach_a_server_only_with_a_key(written: Cases, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    with pytest.raises(ReftuneError, match="without a key; give --api-key"):
        launch.command_line(written.model, [], 1, "0.0.0.0")
    launch.command_line(written.model, [], 1, "0.0.0.0", ["--api-key", "secret"])
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    launch.command_line(written.model, [], 1, "0.0.0.0")


def started(monkeypatch: pytest.MonkeyPatch, *arguments: str, keys: str = "") -> tuple[Any, list[list[str]]]:
    """What the command `reftune serve` did: its result, and how it would have started vLLM."""
    commands: list[list[str]] = []
    monkeypatch.setenv("REFTUNE_API_KEYS", keys)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest, _find=find_spec: name == "vllm" or _find(name))
    monkeypatch.setattr(launch, "supported", lambda model, adapters: launch.unservable_adapter(adapters))
    monkeypatch.setattr(launch.os, "execve", lambda program, command, environment: commands.append(command))
    monkeypatch.setattr("reftune.serving.server.serve", lambda *args: commands.append(["embedded"]))
    return CliRunner().invoke(app, ["serve", *arguments]), commands


def test_settings_of_the_command_reach_vllm_by_its_names(written: Cases, monkeypatch: pytest.MonkeyPatch) -> None:
    _, (command, *_) = started(
        monkeypatch, written.model, "--engine", "vllm", "--dtype", "float32", "--base-name", "tiny", "--no-ui",
        "--max-model-len", "99", "--batch-tokens", "64", "--port", "7", "--seed", "3",
    )  # fmt: skip
    found = flags(command)
    wanted = {
        "--dtype": "float32",
        "--served-model-name": "tiny",
        "--max-model-len": "99",
        "--port": "7",
        "--seed": "3",
    }
    assert wanted.items() <= found.items() and found["--max-num-batched-tokens"] == "64"


@pytest.mark.parametrize(
    ("given", "keys", "said"),
    [(["--api-keys", "keys"], "", "--api-keys"), ([], "key", "REFTUNE_API_KEYS"), (["--timeout", "5"], "", "--timeout"),
     (["--max-requests", "5"], "", "--max-requests")],
)  # fmt: skip
def test_settings_that_vllm_lacks_are_not_dropped(
    given: list[str], keys: str, said: str, written: Cases, monkeypatch: pytest.MonkeyPatch
) -> None:
    for engine in ("vllm", "auto"):
        result, commands = started(monkeypatch, written.model, "--engine", engine, *given, keys=keys)
        assert said in result.stderr
        assert (result.exit_code, commands) == ((2, []) if engine == "vllm" else (0, [["embedded"]]))


@pytest.mark.parametrize("change", [{"component": "mlp_output"}, {"act_fn": "gelu"}, {"modules_to_save": ["lm_head"]}])
def test_a_folder_with_an_adapter_that_vllm_cannot_serve_starts_no_vllm(
    change: dict[str, Any], written: Cases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(written.adapter("l1"), tmp_path / "one")
    config = tmp_path / "one" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    for engine in ("vllm", "auto"):
        result, commands = started(monkeypatch, written.model, "--engine", engine, "-a", str(tmp_path))
        assert "adapter 'one': " in result.stderr
        assert (result.exit_code, commands) == ((2, []) if engine == "vllm" else (0, [["embedded"]]))


def test_a_missing_vllm_and_a_missing_folder_are_said(written: Cases, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ReftuneError, match="no such folder"):
        launch.command_line(written.model, ["nowhere"], 1, "localhost")
    monkeypatch.setattr(launch, "_command", lambda: None)
    with pytest.raises(ReftuneError, match="vLLM is not installed"):
        launch.command_line(written.model, [], 1, "localhost")


@pytest.mark.parametrize(
    ("change", "said"),
    [({}, None), ({"component": "mlp_output"}, "block_output only"), ({"act_fn": "gelu"}, "linear edits only"), ({"method": "gated"}, "gate is a step"),
     ({"modules_to_save": ["lm_head"]}, "modules_to_save"), ({"trainable_token_indices": [3]}, "trainable_token_indices")],
)  # fmt: skip
def test_auto_is_told_which_adapter_vllm_cannot_serve(
    change: dict[str, Any], said: str | None, written: Cases, tmp_path: Path
) -> None:
    folder = tmp_path / "adapters" / "one"
    shutil.copytree(written.adapter("l1"), folder)
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    reason = launch.unservable_adapter([folder.parent])
    assert (reason is None) if said is None else (reason is not None and "'one'" in reason and said in reason)
