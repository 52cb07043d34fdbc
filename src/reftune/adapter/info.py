"""What an adapter folder holds, read from its two files without loading a base model."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from reftune.adapter.checkpoint import EDIT_KEY, WEIGHTS_FILE, check_weights_file, read_adapter_config
from reftune.adapter.config import ReftConfig
from reftune.edits import make_edit
from reftune.engine.positions import Positions, parse_positions
from reftune.errors import ReftuneError

_LAYER = re.compile(r"\.(\d+)(?:\.|$)")


@dataclass(frozen=True)
class EditInfo:
    """One edit of an adapter.

    Attributes:
        block: module path of its block.
        layer: the block's number; None where the path has none.
        part: the positions that it serves: "both", or "prefix" and "suffix" of an untied pair.
        parameters: numbers in its tensors.
        norms: Frobenius norm by tensor name.
        linear_norm: of the matrix that a linear edit adds (h + hM + c), ||M||; None where it is not linear.
        constant_norm: of the vector it adds, ||c||; likewise.
    """

    block: str
    layer: int | None
    part: str
    parameters: int
    norms: dict[str, float]
    linear_norm: float | None
    constant_norm: float | None


@dataclass(frozen=True)
class AdapterInfo:
    """An adapter: its configuration, its edits in the order of layers, and the size of its weights file in bytes."""

    config: ReftConfig
    edits: list[EditInfo]
    file_bytes: int

    @property
    def positions(self) -> Positions:
        """The positions, parsed."""
        return parse_positions(self.config.positions)

    @property
    def parameters(self) -> int:
        """Trained numbers, those of `modules_to_save` left out."""
        return sum(edit.parameters for edit in self.edits)


def read_adapter_info(folder: str | Path) -> AdapterInfo:
    """Read an adapter folder.

    Raises:
        ReftuneError: no adapter there, or a damaged file.
    """
    folder = Path(folder).expanduser()
    values = read_adapter_config(folder)
    check_weights_file(folder)
    config = ReftConfig.from_pretrained(str(folder))
    if not isinstance(config, ReftConfig):
        raise ReftuneError(f"{folder}: peft_type is {values.get('peft_type')!r}, not 'REFT'.")
    tensors: dict[tuple[str, str], dict[str, Tensor]] = {}
    for name, tensor in load_file(folder / WEIGHTS_FILE).items():
        if match := EDIT_KEY.match(name):
            tensors.setdefault((match["block"], match["kind"]), {})[match["tensor"]] = tensor
    if not tensors:
        raise ReftuneError(f"{folder / WEIGHTS_FILE} holds no edits.")
    untied = {block for block, kind in tensors if kind == "reft_suffix_edits"}
    edits = []
    for (block, kind), held in tensors.items():
        part = "suffix" if kind == "reft_suffix_edits" else "prefix" if block in untied else "both"
        edits.append(_edit_info(config, block, part, held))
    edits.sort(key=lambda edit: (edit.layer if edit.layer is not None else -1, edit.block, edit.part))
    return AdapterInfo(config, edits, (folder / WEIGHTS_FILE).stat().st_size)


def _edit_info(config: ReftConfig, block: str, part: str, held: dict[str, Tensor]) -> EditInfo:
    linear = constant = None
    width = max(tensor.shape[-1] for tensor in held.values())
    if (edit := _rebuilt(config, width, held)) is not None:
        linear = float(torch.linalg.matrix_norm(edit.A.double() @ edit.B.double()))
        constant = float(torch.linalg.vector_norm(edit.b.double() @ edit.B.double()))
    numbers = _LAYER.findall(f".{block}")
    return EditInfo(
        block=block,
        layer=int(numbers[-1]) if numbers else None,
        part=part,
        parameters=sum(tensor.numel() for tensor in held.values()),
        norms={name: math.sqrt(float(tensor.double().square().sum())) for name, tensor in sorted(held.items())},
        linear_norm=linear,
        constant_norm=constant,
    )


def _rebuilt(config: ReftConfig, width: int, held: dict[str, Tensor]) -> Any:
    """The edit as (A, b, B); None where it is not linear, or of a class that is not registered here."""
    try:
        edit: Any = make_edit(config.method, width, config.r, **config.options)
        edit.load_state_dict(held)
        return edit.eval().fold()
    except (ReftuneError, AttributeError, NotImplementedError, RuntimeError):
        return None
