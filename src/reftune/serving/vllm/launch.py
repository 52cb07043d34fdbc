"""`reftune serve --engine vllm`: become `vllm serve` with the flags and the environment that ReFT adapters need."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from reftune.adapter.checkpoint import CONFIG_FILE, trained_beside_edits
from reftune.errors import ReftuneError
from reftune.models import BUNDLED, bundled_folder
from reftune.serving.catalogue import Catalogue
from reftune.serving.server import SECONDS_TO_END
from reftune.serving.settings import LOCAL_HOSTS
from reftune.serving.vllm.requested import FOLDERS
from reftune.serving.vllm.startup import REFUSED

MIN_RANK, MIN_SLOTS, MAX_SLOTS, CACHE = 8, 8, 64, 4096


def supported(model: str, adapters: Sequence[str | Path] = ()) -> str | None:
    """Why vLLM cannot serve a model and its adapters; None where it can, as far as is seen without starting it.

    Args:
        model: folder or hub name of the base model.
        adapters: folders of adapters.
    """
    if importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed"
    if _command() is None:
        return "vLLM is installed without its command `vllm`"
    from reftune.serving.vllm.hooking import differences

    if changed := differences():
        return f"this version of vLLM is not known: {changed[0]}"
    if reason := _architecture(model):
        return reason
    return unservable_adapter(adapters)


def unservable_adapter(adapters: Sequence[str | Path]) -> str | None:
    """The first adapter of these folders that vLLM cannot serve, and why; None where it can serve all."""
    for name, config in _configs(Catalogue(adapters)):
        if config.get("peft_type") != "REFT":
            continue
        if config.get("component", "block_output") != "block_output":
            return f"{name}: component={config['component']!r}, and vLLM can edit block_output only"
        if config.get("method") == "gated":
            return f"{name}: method='gated', whose gate is a step, and vLLM can apply linear edits only"
        if config.get("act_fn") not in (None, "linear"):
            return f"{name}: act_fn={config['act_fn']!r}, and vLLM can apply linear edits only"
        if beside := trained_beside_edits(config):
            return f"{name}: it replaces weights of the base model ({beside})"
    return None


def launch(model: str, adapters: Sequence[str | Path], port: int, host: str, extra: Sequence[str] = ()) -> NoReturn:
    """**Replace this process** by `vllm serve`.

    Args:
        model: folder or hub name of the base model.
        adapters: folders that are adapters or hold them; new ones are found while the server runs.
        port: to listen on.
        host: likewise.
        extra: further flags of `vllm serve`, which win over those chosen here.

    Raises:
        ReftuneError: vLLM is not there, a folder is not, or a flag that takes the adapters away.
    """
    if model == BUNDLED:
        named = any(flag.startswith("--served-model-name") for flag in extra)
        model, extra = str(bundled_folder()), [*extra, *([] if named else ["--served-model-name", BUNDLED])]
    command, environment = command_line(model, adapters, port, host, extra)
    os.execve(command[0], command, {**os.environ, **environment})


def command_line(
    model: str, adapters: Sequence[str | Path], port: int, host: str, extra: Sequence[str] = ()
) -> tuple[list[str], dict[str, str]]:
    """What `launch` executes: the command, and what it adds to the environment.

    Raises:
        ReftuneError: as ``launch``.
    """
    program = _command()
    if program is None:
        raise ReftuneError(
            "--engine vllm: vLLM is not installed here. pip install vllm (Linux), or use --engine embedded."
        )
    given = {flag.split("=")[0].replace("_", "-") for flag in extra if flag.startswith("--")}
    if host not in LOCAL_HOSTS and "--api-key" not in given and not os.environ.get("VLLM_API_KEY"):
        raise ReftuneError(
            f"host={host!r}: others could reach this server without a key; give --api-key KEY, or set VLLM_API_KEY, "
            "or keep --host 127.0.0.1."
        )
    if "--no-enable-lora" in given or "--api-server-count" in given:
        raise ReftuneError(
            "--no-enable-lora and --api-server-count do not go with adapters that are loaded while the server runs: "
            "several API servers would give one id to different adapters. Start more servers behind a proxy."
        )
    if unsafe := sorted(given & {f"--{option.replace('_', '-')}" for option in REFUSED.keys() - {"runner"}}):
        reason = REFUSED[unsafe[0].removeprefix("--").replace("-", "_")]
        raise ReftuneError(f"{unsafe[0]}: {reason}. Leave it out to serve adapters.")
    folders = [str(Path(folder).expanduser().resolve()) for folder in adapters]
    catalogue = Catalogue(folders)
    configs = [config for _, config in _configs(catalogue)]
    reft = [config for config in configs if config.get("peft_type") == "REFT"]
    slots = str(min(max(MIN_SLOTS, len(configs) + sum(map(len, catalogue.stores))), MAX_SLOTS))
    chosen = {"--max-loras": slots, "--max-cpu-loras": str(max(CACHE, 2 * len(configs)))}
    chosen["--shutdown-timeout"] = str(SECONDS_TO_END)
    if len(reft) == len(configs):  # with no LoRA adapter to serve, vLLM need not wrap the linear layers
        chosen["--lora-target-modules"] = "none"
    else:
        chosen["--max-lora-rank"] = str(_lora_rank(configs))
    chosen["--additional-config"] = json.dumps({"reftune": _room(reft)})
    flags = [part for flag, value in chosen.items() if flag not in given for part in (flag, value)]
    command = [program, "serve", model, "--host", host, "--port", str(port), "--enable-lora", *flags, *extra]
    plugins = os.environ.get("VLLM_PLUGINS") or ",".join(_plugins())
    return command, {
        FOLDERS: os.pathsep.join(folders),
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_PLUGINS": plugins if "reftune" in plugins.split(",") else f"{plugins},reftune",
    }


def _plugins() -> list[str]:
    """Endpoint plug-ins of vLLM load only where they are named, and then no others do: name all that are there."""
    general = {point.name for point in importlib.metadata.entry_points(group="vllm.general_plugins")}
    return sorted(general | {"reftune"})


def _command() -> str | None:
    """The `vllm` beside this Python, or on the path."""
    beside = Path(sys.executable).parent / "vllm"
    return str(beside) if beside.is_file() else shutil.which("vllm")


def _configs(catalogue: Catalogue) -> list[tuple[str, dict[str, object]]]:
    """The configurations of all adapters with what each is; the users of a store have one."""
    folders = [(f"adapter {name!r}", _config(folder)) for name, folder in sorted(catalogue.adapters().items())]
    return [*folders, *((f"users of {store.path}", store.config) for store in catalogue.stores)]


def _config(folder: Path) -> dict[str, object]:
    """An adapter's configuration; empty where it cannot be read: the server says so when it is asked for."""
    try:
        found = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _room(configs: list[dict[str, object]]) -> dict[str, object]:
    """How much room the banks for CUDA graphs need (see ``slots.Settings``)."""
    ranks = [r for config in configs if isinstance(r := config.get("r"), int)]
    return {"rank": max([MIN_RANK, *ranks]), "untied": any(config.get("share_weights") is False for config in configs)}


def _lora_rank(configs: list[dict[str, object]]) -> int:
    ranks = [r for config in configs if config.get("peft_type") == "LORA" and isinstance(r := config.get("r"), int)]
    return next((size for size in (8, 16, 32, 64, 128, 256, 320, 512) if size >= max([8, *ranks])), 512)


def _architecture(model: str) -> str | None:
    """Why vLLM has no class for a model, or one without adapters."""
    folder = Path(model).expanduser()
    if not (folder / "config.json").is_file():
        return None
    try:
        names = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures") or []
    except ValueError as error:
        return f"{folder / 'config.json'} cannot be read ({error})"
    from vllm.model_executor.models.registry import ModelRegistry  # pyright: ignore[reportMissingImports]

    known = set(ModelRegistry.get_supported_archs())
    return None if known & set(names) else f"vLLM has no model class for {', '.join(names) or 'this model'}"
