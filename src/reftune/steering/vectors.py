"""Control vectors of llama.cpp, repeng and EasySteer: GGUF files with a vector `direction.N` for the output of block N.

llama.cpp and repeng have none for block 0. EasySteer keeps a vector by itself in a PyTorch file too. Source: llama.cpp,
`common_control_vector_load`; repeng, `ControlVector.export_gguf`; EasySteer's vector specifications.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from reftune.errors import ReftuneError
from reftune.output.files import replaced
from reftune.output.targets import refuse_dangling

_NAME = re.compile(r"direction\.(0|[1-9]\d{0,4})")
_TENSORS = (".pt", ".pth")
ANY_LAYER = -1
"""The key of a vector that its file gives no block."""
_KIND = "controlvector"


def read_vectors(path: str | Path) -> dict[int, Float[np.ndarray, " width"]]:
    """The vectors of a file, by the number of the block (`ANY_LAYER` where a PyTorch file holds one vector alone).

    Raises:
        ReftuneError: no such file, one that holds no control vector, or a pickle, which could run code.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        refuse_dangling(path)
        raise ReftuneError(f"{path}: there is no such file.")
    if path.suffix.lower() in _TENSORS:
        return _read_tensor(path)
    gguf = _gguf()
    try:
        reader = gguf.GGUFReader(str(path))
        found = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
        field = reader.get_field("general.architecture")
        kind = field and bytes(field.parts[field.data[0]]).decode(errors="replace")
    except Exception as error:  # the reader raises whatever damaged bytes lead it to
        raise ReftuneError(f"{path} cannot be read as GGUF ({type(error).__name__}); export it again.") from error
    if kind != _KIND:
        raise ReftuneError(f"{path} holds a {kind or 'model'}, not a control vector.")
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


def may_hold_vectors(source: Any) -> bool:
    """Whether what is to be steered is a file of vectors, by its name."""
    return str(source).lower().endswith((".gguf", *_TENSORS))


def _read_tensor(path: Path) -> dict[int, Float[np.ndarray, " width"]]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a pickle or damaged bytes lead it to
        raise ReftuneError(
            f"{path} holds more than tensors, and reading it could run code: save the vector alone as a tensor, or "
            "export it as GGUF."
        ) from error
    vectors = found if isinstance(found, dict) else {ANY_LAYER: found}
    for layer, vector in vectors.items():
        fits = isinstance(layer, int) and isinstance(vector, torch.Tensor) and vector.is_floating_point()
        if not fits or vector.squeeze().ndim != 1 or not bool(torch.isfinite(vector).all()) or not bool(vector.any()):
            raise ReftuneError(f"{path}: one vector, or one by the number of its layer, was expected; not {layer!r}.")
    return {layer: vector.squeeze().float().numpy() for layer, vector in sorted(vectors.items())}


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
