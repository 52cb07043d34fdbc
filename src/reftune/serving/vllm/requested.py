"""Adapters as vLLM's requests name them: which are ReFT, whether they fit, and one content for one id."""

from __future__ import annotations

import json
import math
import os
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from reftune.adapter.checkpoint import CONFIG_FILE, WEIGHTS_FILE
from reftune.edits import FoldedEdit
from reftune.engine.position_grammar import Positions, parse_positions
from reftune.errors import ReftuneError
from reftune.serving.catalogue import lies_in, refuse_links_out
from reftune.serving.folded import FoldedAdapter, SiteEdit, read_folded
from reftune.users.names import is_store

FOLDERS = "REFTUNE_ADAPTERS"
"""Environment variable: the folders whose adapters are served, as in PATH. Where it is set, others are refused."""
SELF_TEST = "reftune-self-test"
"""Path of an adapter that is no folder: see ``self_test_adapter``."""


@dataclass(frozen=True)
class ModelShape:
    """What an adapter has to fit.

    Attributes:
        layers: decoder blocks of the whole model, also where a pipeline stage holds fewer.
        width: of the hidden state.
    """

    layers: int
    width: int

    @classmethod
    def of(cls, vllm_config: Any) -> ModelShape:
        """From vLLM's configuration."""
        model = vllm_config.model_config
        return cls(model.get_total_num_hidden_layers(), model.get_hidden_size())


def split_scale(path: str) -> tuple[str, float]:
    """Folder and strength of a path as vLLM is given it: ``adapters/poet*0.5``.

    Raises:
        ReftuneError: a strength that is no finite number.
    """
    folder, mark, scale = path.rpartition("*")
    if not mark:
        return path, 1.0
    try:
        strength = float(scale)
    except ValueError:
        strength = math.nan
    if not math.isfinite(strength):
        raise ReftuneError(f"{path}: {scale!r} is no strength; write the folder, or folder*0.5.")
    return folder, strength


def scaled_path(folder: str, strength: float) -> str:
    """What ``split_scale`` takes apart."""
    return folder if strength == 1 else f"{folder}*{strength!r}"


def is_reft(path: str) -> bool:
    """Whether a path names a ReFT adapter (and not, say, a LoRA adapter, which is vLLM's own affair)."""
    folder = Path(path.partition("*")[0]).expanduser()
    if path.startswith(SELF_TEST) or is_store(folder.parent):
        return True
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("peft_type") == "REFT"


def served_folders() -> list[Path]:
    """The folders whose adapters the server may load; empty: any."""
    return [Path(folder).expanduser().resolve() for folder in os.environ.get(FOLDERS, "").split(os.pathsep) if folder]


def refuse_lora_unless(acting: bool, path: str) -> None:
    """Refuse a LoRA adapter where it would do nothing, without any sign, or where its folder is not served.

    Raises:
        ReftuneError: it would, or is not.
    """
    refuse_outside(path)
    if not acting:
        raise ReftuneError(
            f"{path}: a LoRA adapter, and this server was started for ReFT adapters alone "
            "(--lora-target-modules none). Start it without that flag, or with a LoRA adapter in its folders."
        )


def refuse_outside(path: str) -> Path:
    """The folder of a path, if the server may read it.

    Raises:
        ReftuneError: it lies in none of the served folders, or a file of it does not.
    """
    folder, allowed = Path(path).expanduser().resolve(), served_folders()
    if allowed and not lies_in(folder, allowed):
        raise ReftuneError(f"{path}: this server serves adapters of {', '.join(map(str, allowed))} only.")
    if allowed:
        refuse_links_out(folder, allowed)
    return folder


def read_checked(path: str, shape: ModelShape) -> FoldedAdapter:
    """Read a ReFT folder for vLLM.

    Raises:
        ReftuneError: a folder that is not served, cannot be read, does not fit the model, or needs more than vLLM can.
    """
    if path.startswith(SELF_TEST):
        return self_test_adapter(path, shape)
    place, strength = split_scale(path)
    adapter = read_folded(refuse_outside(place))
    check(adapter, shape)
    return adapter if strength == 1 else _scaled(adapter, strength)


def _scaled(adapter: FoldedAdapter, strength: float) -> FoldedAdapter:
    """The same edits, each adding ``strength`` times as much."""
    edits = (
        replace(edit, folded=FoldedEdit(edit.folded.A, edit.folded.b, strength * edit.folded.B))
        for edit in adapter.edits
        if edit.folded is not None
    )
    return replace(adapter, digest=f"{adapter.digest}*{strength!r}", edits=tuple(edits))


def check(adapter: FoldedAdapter, shape: ModelShape) -> None:
    """Refuse an adapter that vLLM cannot apply to a model of this shape.

    Raises:
        ReftuneError: says which, and what can serve it.
    """
    where = adapter.folder / CONFIG_FILE
    elsewhere = "Serve it with reftune serve --engine embedded."
    if adapter.component.split(".")[-1] != "block_output" or adapter.component not in (
        "block_output",
        "language.block_output",
    ):
        raise ReftuneError(f"{where}: component={adapter.component!r}: vLLM can edit block_output only. {elsewhere}")
    if not adapter.linear:
        raise ReftuneError(
            f"{where}: its edit is not linear (a gate, act_fn, an edit of your own), vLLM cannot fold it. {elsewhere}"
        )
    for edit in adapter.edits:
        if edit.layer is None or edit.layer >= shape.layers or edit.width != shape.width:
            raise ReftuneError(
                f"{adapter.folder / WEIGHTS_FILE}: an edit of width {edit.width} at {edit.block}; the served model has "
                f"{shape.layers} layers (0 to {shape.layers - 1}) of width {shape.width}. It was trained on "
                "another base model."
            )
    if adapter.layers == "all" and len({edit.layer for edit in adapter.edits}) != shape.layers:
        raise ReftuneError(
            f"{where}: layers_to_transform='all' with edits at {len(adapter.edits)} layers; the served model has "
            f"{shape.layers}. It was trained on another base model."
        )


def self_test_adapter(path: str, shape: ModelShape) -> FoldedAdapter:
    """An adapter that throws the last prompt token's state far out, to one side or, at ``...-``, to the other."""
    signs = torch.randint(0, 2, (1, shape.width), generator=torch.Generator().manual_seed(0)) * 2.0 - 1.0
    far = 300.0 * (-signs if path.endswith("-") else signs)
    folded = FoldedEdit(torch.zeros(shape.width, 1), torch.ones(1), far)
    last = shape.layers - 1
    edit = SiteEdit(f"layers.{last}", last, "both", folded)
    return FoldedAdapter(Path(path), path, parse_positions("l1"), False, "block_output", last, None, (edit,))


@dataclass(frozen=True)
class Known:
    """What EngineCore keeps of an adapter that a request named; ``digest`` is None for a LoRA adapter."""

    path: str
    positions: Positions | None = None
    untied: bool = False
    digest: str | None = None


class Requested:
    """The adapters that requests have named, by vLLM's integer id; safe to use from many threads.

    vLLM caches an adapter by its id, so an id must stand for one content. The first request that names an id fixes it.

    Args:
        shape: of the served model.
        lora: whether LoRA adapters act: vLLM has wrapped the linear layers.
    """

    def __init__(self, shape: ModelShape, lora: bool = True):
        self.shape, self.lora = shape, lora
        self._known: dict[int, Known] = {}
        self._lock = threading.Lock()

    @classmethod
    def of(cls, vllm_config: Any) -> Requested:
        """For an engine of this configuration."""
        return cls(ModelShape.of(vllm_config), vllm_config.lora_config.target_modules != ["none"])

    def known(self, lora_request: Any) -> Known:
        """What an adapter is; **reads it** when its id is seen for the first time.

        Raises:
            ReftuneError: as ``read_checked``; or an id that stood for another folder.
        """
        number, path = lora_request.lora_int_id, lora_request.lora_path
        found = self._known.get(number)
        if found is None:
            with self._lock:
                found = self._known.get(number) or self.read(path)
                self._known[number] = found
        if found.path != path and (found.digest is not None or is_reft(path)):
            raise ReftuneError(
                f"adapter id {number} was {found.path} and is now {path}: give each adapter an id of its own, vLLM "
                "keeps adapters by their ids."
            )
        return found

    def read(self, path: str) -> Known:
        """What lies at a path now.

        Raises:
            ReftuneError: as ``read_checked``; a LoRA adapter that would do nothing, or that is not served.
        """
        if path.startswith(SELF_TEST):
            raise ReftuneError(f"{path}: no folder, but an adapter by which an engine tests itself.")
        if not is_reft(path):
            refuse_lora_unless(self.lora, path)
            return Known(path)
        return _known(path, read_checked(path, self.shape))

    def admit_self_test(self, number: int, path: str) -> None:
        """Let requests of the engine itself name one of the adapters of its self-test, which nobody else may."""
        self._known[number] = _known(path, self_test_adapter(path, self.shape))


def _known(path: str, adapter: FoldedAdapter) -> Known:
    return Known(path, adapter.positions, adapter.untied, adapter.digest)
