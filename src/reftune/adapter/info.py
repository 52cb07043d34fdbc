"""What an adapter folder holds, read from its two files alone: no base model, torch or PEFT is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from reftune.adapter.checkpoint import (
    LAYER,
    WEIGHTS_FILE,
    edit_tensors,
    read_adapter_config,
    read_weights,
    tensor_values,
)
from reftune.engine.position_grammar import Positions, parse_positions
from reftune.errors import ReftuneError

if TYPE_CHECKING:
    from reftune.adapter.config import ReftConfig

_READS = {
    "loreft": "weight - B", "noreft": "weight - B", "consreft": "-B", "lobireft": "nothing",
    "direft": "weight", "nodireft": "weight", "direft_orthogonal": "weight",
}  # fmt: skip
"""What reads the coordinates in each linear edit, as a checkpoint holds it; B is its rotation or projection."""


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
    """An adapter: its folder, settings as saved, edits in the order of layers, and the size of its file in bytes."""

    folder: Path
    settings: Mapping[str, Any]
    edits: list[EditInfo]
    file_bytes: int

    @property
    def config(self) -> ReftConfig:
        """The settings as PEFT takes them (this imports PEFT)."""
        from reftune.adapter.config import ReftConfig

        return ReftConfig.from_pretrained(str(self.folder))  # type: ignore[return-value]

    @property
    def positions(self) -> Positions:
        """The positions, parsed."""
        return parse_positions(self.settings["positions"])

    @property
    def parameters(self) -> int:
        """Trained numbers of the edits; what else was trained (`modules_to_save`, tokens) is left out."""
        return sum(edit.parameters for edit in self.edits)


def read_adapter_info(folder: str | Path) -> AdapterInfo:
    """Read an adapter folder.

    Raises:
        ReftuneError: no adapter there, or files that loading it would refuse.
    """
    folder = Path(folder).expanduser()
    settings = read_adapter_config(folder)
    tensors = read_weights(folder, settings)
    edits = []
    for (block, part), names in edit_tensors(folder / WEIGHTS_FILE, settings, tensors).items():
        edits.append(
            _edit_info(settings, block, part, {own: tensor_values(tensors[name]) for own, name in names.items()})
        )
    edits.sort(key=lambda edit: (edit.layer if edit.layer is not None else -1, edit.block, edit.part))
    return AdapterInfo(folder, settings, edits, (folder / WEIGHTS_FILE).stat().st_size)


def _edit_info(settings: Mapping[str, Any], block: str, part: str, tensors: dict[str, np.ndarray]) -> EditInfo:
    linear = constant = None
    if (form := _linear_form(settings, tensors)) is not None:
        A, b, B = form
        linear = float(np.sqrt(max(0.0, np.sum((A @ A.T) * (B @ B.T)))))  # ||A^T B||, without its width x width numbers
        constant = float(np.linalg.norm(b @ B))
    numbers = LAYER.findall(f".{block}")
    return EditInfo(
        block=block,
        layer=int(numbers[-1]) if numbers else None,
        part=part,
        parameters=sum(tensor.size for tensor in tensors.values()),
        norms={name: float(np.linalg.norm(tensor)) for name, tensor in sorted(tensors.items())},
        linear_norm=linear,
        constant_norm=constant,
    )


def _linear_form(settings: Mapping[str, Any], held: dict[str, np.ndarray]) -> tuple[np.ndarray, ...] | None:
    """(A^T, b, B) of h + (hA + b)B, as `fold` of the edit gives it; None where the edit is not linear."""
    reads = _READS.get(settings["method"])
    if reads is None:
        return _form_of_own_class(settings, held)
    if settings.get("act_fn") not in (None, "linear"):
        return None
    B = held.get("rotation", held.get("projection"))
    b, weight = held.get("bias"), held.get("weight", np.zeros(1))
    if B is None or b is None:
        return None
    A = {"weight": weight, "weight - B": weight - B, "-B": -B, "nothing": np.zeros_like(B)}[reads]
    return A, b - held.get("offset", 0.0), B


def _form_of_own_class(settings: Mapping[str, Any], held: dict[str, np.ndarray]) -> tuple[np.ndarray, ...] | None:
    """The same of a user's edit, from its class; None where that is not registered here."""
    import torch

    from reftune.edits import make_edit

    options = {name: settings[name] for name in ("dropout", "act_fn", "init") if name in settings}
    try:
        width = max(tensor.shape[-1] for tensor in held.values())
        edit: Any = make_edit(settings["method"], width, settings["r"], **options)
        edit.load_state_dict({name: torch.from_numpy(tensor) for name, tensor in held.items()})
        folded = edit.eval().fold()
    except (ReftuneError, AttributeError, NotImplementedError, RuntimeError):
        return None
    return tuple(part.double().numpy() for part in (folded.A.mT, folded.b, folded.B))
