import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from reftune import ReftuneError
from reftune.serving.vllm import launch
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
    found = flags(launch.command_line(written.model, [written.folder / "adapters"], 1, "::")[0])
    assert "--lora-target-modules" not in found and found["--max-lora-rank"] == "8"
    assert json.loads(found["--additional-config"])["reftune"]["untied"] is True


def test_flags_of_the_caller_win(written: Cases, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    command, environment = launch.command_line(
        written.model, [written.adapter("l1")], 1, "h", ["--max-loras=2", "--max_cpu_loras", "3"]
    )
    assert not {"--max-loras", "--max-cpu-loras"} & set(command) and "--max-loras=2" in command
    assert environment["VLLM_PLUGINS"] == "other,reftune"


@pytest.mark.parametrize("extra", [["--no-enable-lora"], ["--api-server-count", "2"], ["--api_server_count=4"]])
def test_flags_that_would_mix_adapters_up_are_refused(extra: list[str], written: Cases) -> None:
    with pytest.raises(ReftuneError, match="one id to different adapters"):
        launch.command_line(written.model, [], 1, "h", extra)


def test_a_missing_vllm_and_a_missing_folder_are_said(written: Cases, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ReftuneError, match="no such folder"):
        launch.command_line(written.model, ["nowhere"], 1, "h")
    monkeypatch.setattr(launch, "_command", lambda: None)
    with pytest.raises(ReftuneError, match="vLLM is not installed"):
        launch.command_line(written.model, [], 1, "h")


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
