"""Begin training from an adapter that adds a vector (of `reftune steer`), rather than from the identity."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from reftune.adapter.checkpoint import CONFIG_FILE, EDIT_KEY, WEIGHTS_FILE, read_adapter_config, read_weights
from reftune.edits import Edit
from reftune.errors import ReftuneError


def start_from(model: PeftModel, folder: str | Path, adapter_name: str = "default") -> None:
    """Let an adapter's edits add what another adapter adds, to begin with; **changes the edits**.

    Edits of layers that the other adapter does not have stay as they are.

    Args:
        model: with an untrained ReFT adapter.
        folder: of a `lobireft` adapter: at every site h + R^T b.
        adapter_name: of the untrained one.

    Raises:
        ReftuneError: an adapter of another method, component or width, or with no layer in common.
    """
    folder = Path(folder).expanduser()
    vectors = _added(folder)
    config: Any = model.peft_config[adapter_name]
    component = read_adapter_config(folder).get("component")
    if component != config.component:
        raise ReftuneError(f"{folder} edits {component!r}, this adapter {config.component!r}: take the same component.")
    edits = model.base_model.engine.edits(adapter_name)  # type: ignore[union-attr, operator]
    common = [
        (edit, vectors[path.removesuffix(":suffix")])
        for path, edit in edits.items()
        if path.removesuffix(":suffix") in vectors
    ]
    if not common:
        raise ReftuneError(
            f"{folder} edits {', '.join(vectors)}, of which this adapter edits none: choose such layers."
        )
    for edit, vector in common:
        if not isinstance(edit, Edit) or edit.width != len(vector):
            raise ReftuneError(f"{folder} has vectors of width {len(vector)}, which do not fit this model's edits.")
        with torch.no_grad():
            edit.start_at(vector)


def _added(folder: Path) -> dict[str, Tensor]:
    """What a `lobireft` adapter adds, by block path."""
    config = read_adapter_config(folder)
    read_weights(folder, config)
    if config.get("method") != "lobireft":
        raise ReftuneError(
            f"{folder / CONFIG_FILE}: method is {config.get('method')!r}; training starts from a direction, as "
            "`reftune steer` writes it (lobireft)."
        )
    tensors: dict[str, dict[str, Tensor]] = {}
    for name, tensor in load_file(folder / WEIGHTS_FILE).items():
        if match := EDIT_KEY.match(name):
            tensors.setdefault(match["block"], {})[match["tensor"]] = tensor.float()
    return {block: held["bias"] @ held["rotation"] for block, held in tensors.items()}
