"""Adapter folders made by a stranger: every reader refuses them in one clear error, and none runs or follows anything."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors import SafetensorError

import reftune
from reftune.adapter.checkpoint import CONFIG_FILE, WEIGHTS_FILE
from reftune.adapter.config import load_adapter
from reftune.adapter.info import read_adapter_info
from reftune.errors import ReftuneError
from reftune.serving.catalogue import Catalogue
from reftune.serving.folded import read_folded
from tests.tiny_models import TINY

BOMB = "touched-by-a-pickle"
READERS: dict[str, Callable[[Path], Any]] = {
    "info": read_adapter_info,
    "serving": read_folded,
    "load_adapter": lambda folder: load_adapter(TINY["llama"](), folder),
    "peft": lambda folder: PeftModel.from_pretrained(TINY["llama"](), str(folder)),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    config = reftune.ReftConfig(method="direft", r=2, layers_to_transform=[0, 1], task_type="CAUSAL_LM")
    get_peft_model(TINY["llama"](), config).save_pretrained(str(folder))
    return folder


class Bomb:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {BOMB}",)


def pickled(folder: Path) -> None:
    (folder / WEIGHTS_FILE).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Bomb()))


def torch_pickled(folder: Path) -> None:
    (folder / WEIGHTS_FILE).unlink()
    torch.save({"x": Bomb()}, folder / "adapter_model.bin", pickle_module=pickle)


def raw(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / WEIGHTS_FILE
        path.write_bytes(change(path.read_bytes()))

    return damage


def header(change: Callable[[dict[str, Any]], Any]) -> Any:
    def changed(whole: bytes) -> bytes:
        length = int.from_bytes(whole[:8], "little")
        new = json.dumps(change(json.loads(whole[8 : 8 + length]))).encode()
        new += b" " * (-len(new) % 8)
        return len(new).to_bytes(8, "little") + new + whole[8 + length :]

    return raw(changed)


def first(**fields: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def change(found: dict[str, Any]) -> dict[str, Any]:
        name = next(name for name in found if name != "__metadata__")
        return {**found, name: {**found[name], **fields}}

    return change


def renamed(new: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def change(found: dict[str, Any]) -> dict[str, Any]:
        name = next(name for name in found if name != "__metadata__")
        return {new.format(name) if key == name else key: value for key, value in found.items()}

    return change


def filled(value: float) -> Callable[[bytes], bytes]:
    def change(whole: bytes) -> bytes:
        begin = 8 + int.from_bytes(whole[:8], "little")
        return whole[:begin] + np.float32(value).tobytes() + whole[begin + 4 :]

    return change


def config(**fields: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / CONFIG_FILE
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return damage


def config_text(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / CONFIG_FILE).write_bytes(text.encode("utf-8", "surrogateescape")) and None


def in_place_of(name: str, make: Callable[[Path], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return damage


ATTACKS: dict[str, Callable[[Path], None]] = {
    "a pickle in place of the weights": pickled,
    "a pickle of PyTorch in place of the weights": torch_pickled,
    "a pickle under the weights' name": lambda folder: (folder / WEIGHTS_FILE).write_bytes(pickle.dumps(Bomb())) and None,
    "a header longer than the file": raw(lambda whole: (2**62).to_bytes(8, "little") + whole[8:]),
    "a header of 2^64 - 1 bytes": raw(lambda whole: b"\xff" * 8 + whole[8:]),
    "a header of no bytes": raw(lambda whole: bytes(8) + whole[8:]),
    "a header nested too deeply": raw(lambda whole: (100_000).to_bytes(8, "little") + b"[" * 100_000),
    "a header of text that is none": raw(lambda whole: (8).to_bytes(8, "little") + b"\xff" * 8),
    "negative offsets": header(first(data_offsets=[-8, 0])),
    "offsets that run backwards": header(first(data_offsets=[8, 0])),
    "offsets behind the end": header(first(data_offsets=[0, 2**40])),
    "tensors that overlap": header(lambda found: {k: v if k == "__metadata__" else {**v, "data_offsets": [0, 4 * int(np.prod(v["shape"]))]} for k, v in found.items()}),
    "bytes that no tensor owns": raw(lambda whole: whole + b"\0" * 64),
    "a shape that overflows": header(first(shape=[2**40, 2**40])),
    "a negative shape": header(first(shape=[-2, -16])),
    "no shape": header(first(shape=[])),
    "integers": header(first(dtype="I32")),
    "a dtype that is none": header(first(dtype="PICKLE")),
    "NaN": raw(filled(float("nan"))),
    "infinity": raw(filled(float("inf"))),
    "a name that is a path": header(renamed("../../{}")),
    "a name of another layer": header(renamed("base_model.model.model.layers.99.intervention.reft_edits.weight")),
    "a name of the base model's weights": header(renamed("base_model.model.model.layers.0.mlp.up_proj.weight")),
    "a name that is an attribute": header(renamed("base_model.model.__class__.__init__.intervention.reft_edits.bias")),
    "an empty name": header(renamed("")),
    "a field that is none": config(run_me="os.system"),
    "a gigantic rank": config(r=10**9),
    "a rank beyond every integer": config(r=10**40),
    "a rank that is true": config(r=True),
    "a rank that is a fraction": config(r=2.5),
    "layers beyond every model": config(layers_to_transform=[10**9]),
    "a million layers": config(layers_to_transform=list(range(1_000_000))),
    "a component that is code": config(component="__import__('os').system('touch x')"),
    "a component that is a dunder": config(component="__class__"),
    "positions beyond every prompt": config(positions="l" + "9" * 400),
    "positions that are code": config(positions="f1+__import__('os')"),
    "a method that is a path": config(method="os.system"),
    "an activation that is code": config(act_fn="os.system"),
    "a module trained whole that is a path": config(modules_to_save=["../../.."]),
    "a configuration nested too deeply": config_text("[" * 100_000),
    "a configuration that is a list": config_text("[1]"),
    "a configuration of bytes": config_text("\udcff\udcfe"),
    "a configuration with NaN": config_text('{"peft_type": "REFT", "r": NaN}'),
    "a configuration with a long integer": config_text('{"peft_type": "REFT", "r": ' + "9" * 10_000 + "}"),
    "weights of a tebibyte, all but their beginning a hole": lambda folder: os.truncate(folder / WEIGHTS_FILE, 2**40),
    "weights that are a folder": in_place_of(WEIGHTS_FILE, Path.mkdir),
    "weights that are a link to nowhere": in_place_of(WEIGHTS_FILE, lambda path: path.symlink_to("nowhere")),
    "weights that are a link to a device": in_place_of(WEIGHTS_FILE, lambda path: path.symlink_to(os.devnull)),
    "a configuration that is a pipe": in_place_of(CONFIG_FILE, os.mkfifo),
    "weights that are a pipe": in_place_of(WEIGHTS_FILE, os.mkfifo),
}  # fmt: skip


NEED_A_MODEL = ("a component that is code", "a component that is a dunder", "a method that is a path")
"""What only a model can refuse: one could have such a module, a user such a method."""
LEFT_TO_PEFT = ("a module trained whole that is a path",)
"""No module has that name, so PEFT trains and copies none."""
PAIRS = [
    (attack, reader)
    for attack in ATTACKS
    for reader in READERS
    if not (attack in NEED_A_MODEL and reader in ("info", "serving"))
    and not (attack in LEFT_TO_PEFT and reader == "peft")
]
REFUSALS = {"peft": (ReftuneError, SafetensorError, OSError, ValueError, TypeError, RecursionError)}
"""PEFT reads the files itself: what is no such file at all is refused in its words, or those of safetensors."""


@pytest.mark.parametrize(("attack", "reader"), PAIRS)
def test_a_hostile_adapter_is_refused_in_one_clear_error(
    attack: str, reader: str, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(saved, folder)
    ATTACKS[attack](folder)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(REFUSALS.get(reader, ReftuneError)) as caught:  # type: ignore[arg-type]
        READERS[reader](folder)
    assert len(str(caught.value)) < 5000
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}


def test_the_same_folder_untouched_is_read_by_all(saved: Path) -> None:
    for read in READERS.values():
        read(saved)


def test_an_evil_auto_mapping_imports_nothing(saved: Path, tmp_path: Path) -> None:
    """PEFT's auto classes import the module that a configuration names; a ReFT adapter's is never looked at."""
    folder = tmp_path / "adapter"
    shutil.copytree(saved, folder)
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / BOMB)!r}, 'w')")
    config(auto_mapping={"base_model_class": "Evil", "parent_library": "evil"})(folder)
    for read in READERS.values():
        read(folder)
    assert not (tmp_path / BOMB).exists()


def test_no_adapter_takes_the_name_that_means_the_base_model(saved: Path) -> None:
    model = PeftModel.from_pretrained(TINY["llama"](), str(saved))
    with pytest.raises(ReftuneError, match="__base__"):
        model.load_adapter(str(saved), "__base__")
    with pytest.raises(ReftuneError, match="__base__"):
        PeftModel.from_pretrained(TINY["llama"](), str(saved), adapter_name="__base__")
    assert list(model.peft_config) == ["default"]


def test_a_link_out_of_the_served_folder_is_not_followed(saved: Path, tmp_path: Path) -> None:
    served = tmp_path / "served"
    shutil.copytree(saved, served / "good")
    (served / "out").symlink_to(saved)
    assert list(Catalogue([served]).names()) == ["good"]
