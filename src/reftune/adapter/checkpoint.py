"""Adapter folders: what is checked when one is loaded, and loading with errors that say what is wrong with the file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from reftune.errors import ReftuneError
from reftune.output.json_files import read_json_object

if TYPE_CHECKING:
    from peft import PeftModel

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
EDIT_KEY = re.compile(
    r"^(?:base_model\.model\.)?(?P<block>.*?)\.?intervention\.(?P<kind>reft_edits|reft_suffix_edits)\.(?P<tensor>\w+)$"
)
"""A tensor of an edit in a weights file: its block's path, which of an untied pair it belongs to, and its own name."""


def check_tensors(model: nn.Module, config: Any, adapter_name: str, tensors: dict[str, Tensor]) -> None:
    """Compare an adapter's tensors with the edits that the model has for it, before any is copied.

    PEFT copies what fits by name and warns about the rest, which would leave edits at random values.

    Args:
        model: the model or PEFT model with the adapter's edits in place.
        config: the adapter's configuration, for the message.
        adapter_name: the adapter's name on this model.
        tensors: tensors by the model's own parameter names.

    Raises:
        ReftuneError: a tensor that is missing or of another shape.
    """
    marks = (f".reft_edits.{adapter_name}.", f".reft_suffix_edits.{adapter_name}.")
    expected = {name: value for name, value in model.state_dict().items() if any(mark in name for mark in marks)}
    base = getattr(config, "base_model_name_or_path", None)
    prefix = "base_model.model."
    given = {name.removeprefix(prefix): value for name, value in tensors.items()}
    for name, value in expected.items():
        found = given.get(name.removeprefix(prefix))
        if found is None:
            raise ReftuneError(
                f"The adapter holds no tensor for {name.removeprefix(prefix)}: its file is incomplete, or it was "
                f"trained on another base model than this one (trained on {base!r})."
            )
        if found.shape != value.shape:
            raise ReftuneError(
                f"The adapter's {name.removeprefix(prefix)} has shape {tuple(found.shape)}, this base model needs "
                f"{tuple(value.shape)}: it was trained on another base model ({base!r}). Load that one."
            )


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


def check_weights_file(folder: str | Path) -> None:
    """Make sure that an adapter's weights can be read.

    Raises:
        ReftuneError: the file is missing, or is no intact safetensors file.
    """
    path = Path(folder) / WEIGHTS_FILE
    if not path.is_file():
        raise ReftuneError(f"{path} does not exist; the adapter was not saved to its end. Use an earlier checkpoint.")
    try:
        with safe_open(path, framework="pt") as tensors:
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
    read_adapter_config(folder)
    check_weights_file(folder)
    from peft import PeftModel  # here, so that folders can be read without PEFT

    return PeftModel.from_pretrained(model, str(folder), is_trainable=is_trainable)
