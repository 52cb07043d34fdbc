"""Adapter folders: what is checked when one is loaded, and loading with errors that say what is wrong with the file.

PEFT and torch are imported by what needs them: `reftune info` reads a folder without.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from reftune.errors import ReftuneError
from reftune.output.json_files import read_json_object

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
EDIT_KEY = re.compile(
    r"^(?:base_model\.model\.)?(?P<block>.*?)\.?intervention\.(?P<kind>reft_edits|reft_suffix_edits)\.(?P<tensor>\w+)$"
)
"""A tensor of an edit in a weights file: its block's path, which of an untied pair it belongs to, and its own name."""


def read_adapter_config(folder: str | Path) -> dict[str, Any]:
    """The configuration of an adapter folder.

    Raises:
        ReftuneError: no such folder, no adapter in it, or a configuration that is not JSON or not ReFT's.
    """
    folder = Path(folder)
    path = folder / CONFIG_FILE
    if not path.is_file():
        what = "is not a folder" if not folder.is_dir() else f"has no {CONFIG_FILE}"
        raise ReftuneError(f"{folder}: {what}; give the --output folder of `reftune train`, or a saved adapter.")
    config = read_json_object(path, "the adapter must be saved again")
    if config.get("peft_type") != "REFT":
        raise ReftuneError(f"{path}: peft_type is {config.get('peft_type')!r}, not 'REFT'; load it with PEFT itself.")
    return config


def trained_beside_edits(config: dict[str, Any]) -> str | None:
    """What an adapter trained besides its edits, as ``field=value``; None where that is nothing."""
    fields = ("modules_to_save", "trainable_token_indices")
    return next((f"{name}={config[name]!r}" for name in fields if config.get(name)), None)


def check_weights_file(folder: str | Path) -> None:
    """Make sure that an adapter's weights can be read.

    Raises:
        ReftuneError: the file is missing, or is no intact safetensors file.
    """
    path = Path(folder) / WEIGHTS_FILE
    if not path.is_file():
        raise ReftuneError(f"{path} does not exist; the adapter was not saved to its end. Use an earlier checkpoint.")
    try:
        with safe_open(path, framework="numpy") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                tensors.get_slice(name)
    except (SafetensorError, OSError) as error:
        raise ReftuneError(
            f"{path} is not an intact safetensors file ({error}): it was cut off or overwritten. Use an earlier "
            "checkpoint."
        ) from None


def load_adapter(model: nn.Module, folder: str | Path, is_trainable: bool = False) -> PeftModel:
    """Load a saved adapter onto its base model, with clear errors for what can be wrong with the folder.

    Args:
        model: the base model; **it is changed** (edits are attached to it).
        folder: an adapter folder.
        is_trainable: whether training goes on.

    Raises:
        ReftuneError: a folder, file or base model that does not fit.
    """
    from peft import PeftModel

    import reftune.adapter.config  # noqa: F401 (PEFT learns of REFT)

    read_adapter_config(folder)
    check_weights_file(folder)

    return PeftModel.from_pretrained(model, str(folder), is_trainable=is_trainable)
