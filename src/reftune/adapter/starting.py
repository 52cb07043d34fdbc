"""Begin training from an adapter that adds a vector (of `reftune steer`), rather than from the identity."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from reftune.adapter.checkpoint import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    edit_tensors,
    read_adapter_config,
    read_weights,
    tensor_values,
)
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
    given = read_adapter_config(folder)
    vectors = _added(folder, given)
    config: Any = model.peft_config[adapter_name]
    if given["component"] != config.component:
        raise ReftuneError(
            f"{folder} edits {given['component']!r}, this adapter {config.component!r}: take the same component."
        )
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


def _added(folder: Path, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """What a `lobireft` adapter adds, by block path."""
    tensors = read_weights(folder, config)
    if config["method"] != "lobireft":
        raise ReftuneError(
            f"{folder / CONFIG_FILE}: method is {config['method']!r}; training starts from a direction, as "
            "`reftune steer` writes it (lobireft)."
        )
    vectors = {}
    for (block, _), names in edit_tensors(folder / WEIGHTS_FILE, config, tensors).items():
        bias, rotation = (tensor_values(tensors[names[own]]) for own in ("bias", "rotation"))
        vectors[block] = torch.from_numpy(bias @ rotation).float()
    return vectors
