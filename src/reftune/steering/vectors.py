"""Control vectors of llama.cpp, repeng and EasySteer: GGUF files with a vector `direction.N` for the output of block N.

llama.cpp and repeng have none for block 0. EasySteer says in its files what their directions are of; it keeps a vector
by itself in a PyTorch file too. Safetensors files have one layout as good as another, so the one number in a
tensor's name is its block. Source: llama.cpp, `common_control_vector_load`; repeng, `ControlVector.export_gguf`;
EasySteer, `StatisticalControlVector.export_gguf`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file

from reftune.errors import ReftuneError
from reftune.output.files import replaced
from reftune.output.targets import refuse_dangling

_NAME = re.compile(r"direction\.(0|[1-9]\d{0,4})")
_TORCH, _SAFE = (".pt", ".pth", ".bin", ".pkl", ".pickle"), ".safetensors"
ANY_LAYER = -1
"""The key of a vector that its file gives no block."""
_KIND = "controlvector"


def read_vectors(path: str | Path) -> dict[int, Float[np.ndarray, " width"]]:
    """The vectors of a file, by the number of the block (`ANY_LAYER` where a file of tensors does not give it).

    Raises:
        ReftuneError: no such file, one that holds no control vector, or a pickle, which could run code.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        refuse_dangling(path)
        raise ReftuneError(f"{path}: there is no such file.")
    if path.suffix.lower() in (*_TORCH, _SAFE):
        return _read_tensors(path)
    gguf = _gguf()
    try:
        reader = gguf.GGUFReader(str(path))
        found = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
        kind = _text(reader.get_field("general.architecture"))
        of = json.loads(_text(reader.get_field(f"{_KIND}.easysteer")) or "{}").get("component")
    except Exception as error:  # the reader raises whatever damaged bytes lead it to
        raise ReftuneError(f"{path} cannot be read as GGUF ({type(error).__name__}); export it again.") from error
    if kind != _KIND:
        raise ReftuneError(f"{path} holds a {kind or 'model'}, not a control vector.")
    if of not in (None, "hidden_states"):
        raise ReftuneError(f"{path} holds directions of {of}, and hidden states are steered: extract those.")
    vectors: dict[int, np.ndarray] = {}
    for name, vector in found.items():
        match = _NAME.fullmatch(name)
        if match is None or vector.ndim != 1 or vector.dtype not in (np.float32, np.float16):
            raise ReftuneError(f"{path}: {name!r} is no direction of a block (direction.1, ..., a vector of floats).")
        if not np.isfinite(vector).all() or not np.any(vector):
            raise ReftuneError(f"{path}: {name!r} is zero or not finite.")
        vectors[int(match[1])] = vector.astype(np.float32)
    if not vectors:
        raise ReftuneError(f"{path} holds no direction.")
    return dict(sorted(vectors.items()))


def _text(field: Any) -> str | None:
    return None if field is None else bytes(field.parts[field.data[0]]).decode(errors="replace")


def may_hold_vectors(source: Any) -> bool:
    """Whether what is to be steered is a file of vectors, by its name."""
    return str(source).lower().endswith((".gguf", *_TORCH, _SAFE))


def _read_tensors(path: Path) -> dict[int, Float[np.ndarray, " width"]]:
    try:
        if path.suffix.lower() == _SAFE:
            found: Any = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise ReftuneError(f"{path} cannot be read as safetensors ({error}); export it again.") from error
    except Exception as error:  # whatever a pickle or damaged bytes lead it to
        raise ReftuneError(
            f"{path} holds more than tensors, and reading it could run code: save the vectors alone as safetensors, or "
            "export them as GGUF."
        ) from error
    vectors: dict[int, np.ndarray] = {}
    for name, vector in found.items() if isinstance(found, dict) else [("", found)]:
        layer = _layer_of(name, not isinstance(found, dict) or len(found) == 1)
        fits = isinstance(vector, torch.Tensor) and vector.is_floating_point() and vector.squeeze().ndim == 1
        if layer is None or layer in vectors or not fits or not torch.isfinite(vector).all() or not vector.any():
            raise ReftuneError(f"{path}: one vector, or one by the number of its layer, was expected; not {name!r}.")
        vectors[layer] = vector.squeeze().float().numpy()
    if not vectors:
        raise ReftuneError(f"{path} holds no vector.")
    return dict(sorted(vectors.items()))


def _layer_of(name: Any, alone: bool) -> int | None:
    """The layer that a tensor's name gives (`direction.3`, `layers.3.output`); none: of a vector that stands alone."""
    if isinstance(name, int):
        return name
    numbers = re.findall(r"\d+", str(name))
    return ANY_LAYER if not numbers and alone else int(numbers[0]) if len(numbers) == 1 else None


def holds_vectors(path: Path) -> bool:
    """Whether a file is a control vector."""
    try:
        return bool(read_vectors(path))
    except ReftuneError:
        return False


def write_vectors(path: str | Path, vectors: Mapping[int, Float[np.ndarray, " width"]], model_type: str) -> None:
    """Write vectors so that llama.cpp and repeng read them; **replaces the file**, whole.

    Args:
        path: the file.
        vectors: by the number of the block, what is added to its output.
        model_type: of the base model, as its config says.

    Raises:
        ReftuneError: a vector at block 0, which such a file cannot hold.
    """
    if 0 in vectors:
        raise ReftuneError("A control vector cannot hold layer 0: steer a later layer (--layers).")
    with replaced(Path(path)) as partial:
        writer = _gguf().GGUFWriter(str(partial), _KIND)
        writer.add_string(f"{_KIND}.model_hint", model_type)
        writer.add_uint32(f"{_KIND}.layer_count", len(vectors))
        for layer, vector in sorted(vectors.items()):
            writer.add_tensor(f"direction.{layer}", np.ascontiguousarray(vector, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _gguf() -> Any:
    try:
        import gguf
    except ImportError:
        raise ReftuneError("Control vectors need the package gguf: run `pip install gguf`.") from None
    return gguf
