"""Control vectors: written and read again, by repeng's layout, and what is no such file."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from reftune.errors import ReftuneError
from reftune.steering.vectors import read_vectors, write_vectors

VECTORS = {layer: np.random.default_rng(layer).normal(size=8).astype(np.float32) for layer in (12, 3)}


def write_raw(path: Path, kind: str, tensors: dict[str, np.ndarray], **texts: str) -> None:
    writer = gguf.GGUFWriter(str(path), kind)
    for name, text in texts.items():
        writer.add_string(f"{kind}.{name}", text)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_vectors_survive_and_are_named_as_llama_cpp_reads_them(tmp_path: Path) -> None:
    path = tmp_path / "vector.gguf"
    write_vectors(path, VECTORS, "llama")
    found = read_vectors(path)
    assert list(found) == [3, 12] and all(np.array_equal(found[layer], VECTORS[layer]) for layer in found)
    reader = gguf.GGUFReader(str(path))
    assert {tensor.name for tensor in reader.tensors} == {"direction.3", "direction.12"}
    hint = reader.get_field("controlvector.model_hint")
    assert hint is not None and bytes(hint.parts[hint.data[0]]) == b"llama"


def test_what_is_no_control_vector(tmp_path: Path) -> None:
    path = tmp_path / "vector.gguf"
    with pytest.raises(ReftuneError, match="no such file"):
        read_vectors(path)
    with pytest.raises(ReftuneError, match="layer 0"):
        write_vectors(path, {0: VECTORS[3]}, "llama")
    assert not path.exists()
    path.write_bytes(b"GGUF and then nothing of the kind")
    with pytest.raises(ReftuneError, match="cannot be read"):
        read_vectors(path)
    for tensors, words in (
        ({"direction.3": np.zeros(8, np.float32)}, "zero or not finite"),
        ({"direction.3": np.full(8, np.nan, np.float32)}, "zero or not finite"),
        ({"direction.3": np.ones((2, 4), np.float32)}, "no direction"),
        ({"direction.00": np.ones(8, np.float32)}, "no direction"),
        ({"direction.3": np.ones(8, np.int32)}, "no direction"),
    ):
        write_raw(path, "controlvector", tensors)
        with pytest.raises(ReftuneError, match=words):
            read_vectors(path)
    write_vectors(path, {}, "llama")
    with pytest.raises(ReftuneError, match="holds no direction"):
        read_vectors(path)
    write_vectors(path, VECTORS, "llama")
    whole = path.read_bytes()
    for cut in range(0, len(whole), 7):
        path.write_bytes(whole[:cut])
        with pytest.raises(ReftuneError):
            read_vectors(path)


def test_easysteers_directions_are_taken_where_they_are_of_hidden_states(tmp_path: Path) -> None:
    tensors = {f"direction.{layer}": vector for layer, vector in {0: VECTORS[12], 3: VECTORS[3]}.items()}

    def written(native: str) -> Path:
        path = tmp_path / "vector.gguf"
        write_raw(path, "controlvector", tensors, model_hint="llama", method="diffmean", easysteer=native)
        return path

    for component in ('"hidden_states"', "null"):
        found = read_vectors(
            written(f'{{"version":1,"component":{component},"metadata":{{"mapping":[["token_pos",-1]]}}}}')
        )
        assert list(found) == [0, 3] and np.array_equal(found[0], VECTORS[12])
    with pytest.raises(ReftuneError, match=r"directions of attention_heads, and hidden states are steered"):
        read_vectors(written('{"version":1,"component":"attention_heads","metadata":null}'))
    for damaged in ("{", "[]", "3"):
        with pytest.raises(ReftuneError, match="cannot be read as GGUF"):
            read_vectors(written(damaged))


def test_a_model_is_no_control_vector(tmp_path: Path) -> None:
    write_raw(tmp_path / "model.gguf", "llama", {"token_embd.weight": np.ones((4, 4), np.float32)})
    with pytest.raises(ReftuneError, match="holds a llama"):
        read_vectors(tmp_path / "model.gguf")
