"""Reading adapters that pyreft saved."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from reftune.adapter.checkpoint import CONFIG_FILE, not_finite
from reftune.errors import ReftuneError
from reftune.output.json_files import read_json_object
from reftune.pyreft.config import Representation, read_component
from reftune.pyreft.interventions import INTERVENTIONS

_NAMES = {
    "rotate_layer": "rotation",
    "proj_layer.weight": "projection",
    "proj_layer.bias": "offset",
    "learned_source": "bias",
    "learned_source.weight": "weight",
    "learned_source.bias": "bias",
    "weight": "weight",
    "bias": "bias",
}
_ORTHOGONAL = "rotate_layer.parametrizations.weight."


def read_pyreft(folder: Path) -> list[Representation]:
    """The edits of a folder that pyreft's ``save`` wrote, in the order in which they were configured.

    Both spellings of its file names are read (dots or underscores), as ``.bin`` (tensors alone, never arbitrary
    pickles) or safetensors.

    Raises:
        ReftuneError: not such a folder, an intervention that is none of pyreft's six, or a damaged file.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ReftuneError(f"{folder}: has no {CONFIG_FILE} of this library and no config.json of pyreft.")
    config = read_json_object(path, "have pyreft save it again")
    rows, kinds, keys = (config.get(name, []) for name in ("representations", "intervention_types", "sorted_keys"))
    kinds = kinds if isinstance(kinds, list) else [kinds]
    if (
        not rows
        or not isinstance(rows, list)
        or not isinstance(keys, list)
        or not all(isinstance(key, str) for key in keys)
    ):
        raise ReftuneError(f"{path} is not a configuration that pyreft saved: it lists no representations and keys.")
    if len(kinds) == 1:
        kinds = kinds * len(rows)
    if not len(rows) == len(kinds) == len(keys):
        raise ReftuneError(f"{path}: {len(rows)} representations, {len(kinds)} intervention types, {len(keys)} keys.")
    try:
        return [_read_one(folder, row, kind, key) for row, kind, key in zip(rows, kinds, keys, strict=True)]
    except (ValueError, TypeError, RuntimeError, AttributeError, IndexError, OverflowError) as error:
        if isinstance(error, ReftuneError):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ReftuneError(f"{folder} does not hold what pyreft saves ({reason}): have pyreft save it again.") from None


def _read_one(folder: Path, row: Any, kind: str, key: str) -> Representation:
    wanted = (row.get("layer"), row.get("component")) if isinstance(row, dict) else row
    if not isinstance(wanted, (list, tuple)) or len(wanted) < 2:
        raise ReftuneError(f"{folder}: {key}: its representation is {row!r}; pyreft writes [layer, component, ...].")
    layer, component = wanted[:2]
    if not isinstance(component, str) or isinstance(layer, bool) or not isinstance(layer, (int, type(None))):
        raise ReftuneError(f"{folder}: {key}: layer {layer!r} and component {component!r} name no place in a model.")
    if Path(key).name != key:
        raise ReftuneError(f"{folder}: {key!r} is no name of a file in that folder.")
    cls = INTERVENTIONS.get(re.sub(r"^<class '|'>$", "", str(kind)).rpartition(".")[2])
    if cls is None:
        raise ReftuneError(f"{folder}: {key} is a {kind}; pyreft's six are {', '.join(INTERVENTIONS)}.")
    tensors = _to_ours(_read_tensors(folder, key), f"{folder}/{key}")
    r, width = next((value.shape for value in tensors.values() if value.ndim == 2), (0, 0))
    options: dict[str, Any] = {"add_bias": "offset" in tensors}
    if cls is INTERVENTIONS["NodireftIntervention"]:
        tensors.pop("offset", None)  # allocated by pyreft, and not used in its formula
        options = {}
    edit = cls(embed_dim=width, low_rank_dimension=r, **options)
    fill(edit, tensors, f"{folder}/{key}")
    place, number = read_component(component, layer)
    return Representation(place, number, edit)


def _read_tensors(folder: Path, key: str) -> dict[str, Tensor]:
    spellings = dict.fromkeys([key, key.replace(".", "_")])
    names = [
        f"{start}{spelling}{end}"
        for spelling in spellings
        for start in ("intkey_", "")
        for end in (".safetensors", ".bin")
    ]
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        raise ReftuneError(f"{folder}: the file of {key} is missing; looked for {names[0]} and {names[1]}.")
    try:
        return (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except Exception as error:  # torch and safetensors share no base class of their errors
        raise ReftuneError(
            f"{path} cannot be read as tensors ({str(error).splitlines()[0]}); nothing else is loaded."
        ) from None


def _to_ours(tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Pyreft's tensors under our names; a rotation is r x width here, width x r there."""
    found: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if name in ("embed_dim", "interchange_dim") or name.startswith(_ORTHOGONAL):
            continue
        if name not in _NAMES:
            raise ReftuneError(f"{where}: holds {name!r}, which none of pyreft's six interventions has.")
        if not value.is_floating_point():
            raise ReftuneError(f"{where}: {name} holds {value.dtype} and no floating-point numbers: save it again.")
        value = value.float()
        found[_NAMES[name]] = value.mT.contiguous() if name == "rotate_layer" else value.contiguous()
    original = tensors.get(f"{_ORTHOGONAL}original", tensors.get(f"{_ORTHOGONAL}original0"))
    if original is not None:
        found["rotation"] = _orthogonal(original, tensors.get(f"{_ORTHOGONAL}0.base"))
    return found


def _orthogonal(original: Tensor, base: Tensor | None) -> Tensor:
    """The rotation, r x width, that torch's orthogonal parametrization makes of these tensors."""
    layer = torch.nn.Linear(original.shape[1], original.shape[0], bias=False)
    torch.nn.utils.parametrizations.orthogonal(layer)
    state: dict[str, Tensor] = {"parametrizations.weight.original": original.float()}
    if base is not None:
        state["parametrizations.weight.0.base"] = base.float()
    layer.load_state_dict(state, strict=base is not None)
    with torch.no_grad():
        return layer.weight.mT.contiguous()


def fill(edit: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Copy tensors into an edit.

    Raises:
        ReftuneError: tensors missing, left over, of another shape or not finite.
    """
    expected = {name: tuple(value.shape) for name, value in edit.state_dict().items()}
    given = {name: tuple(value.shape) for name, value in tensors.items()}
    if bad := next((name for name, value in tensors.items() if not bool(value.isfinite().all())), None):
        raise not_finite(None, f"{where}: {bad}")
    if expected != given:
        raise ReftuneError(f"{where}: the tensors are {given}, and {type(edit).__name__} needs {expected}.")
    edit.load_state_dict(dict(tensors))
