"""Adapters as arithmetic: folders read straight into (A, b, B), without a model, a PEFT module or a random number.

::

    adapter = read_folded("adapters/poet")       # 0.2 ms for one layer
    adapter.positions, adapter.digest            # what row plans and cache keys need
    for edit in adapter.edits:                   # one a site, two where a pair is untied
        edit.block, edit.layer, edit.part        # "model.layers.8", 8, "both"
        edit.folded                              # FoldedEdit(A, b, B), float32; None where the edit is not linear
        edit.module                              # the edit itself, where it is not linear

The digest is of both files' content. Nothing is trusted: a folder that training, PEFT or `reftune info` would refuse is
refused here, with the same words where they read the same thing.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from reftune.adapter.checkpoint import (
    CONFIG_FILE,
    EDIT_KEY,
    WEIGHTS_FILE,
    check_weights_file,
    read_adapter_config,
    trained_beside_edits,
)
from reftune.edits import Edit, FoldedEdit, RotatedEdit, edit_class, make_edit
from reftune.engine.position_grammar import Positions, parse_positions
from reftune.engine.positions import Part
from reftune.errors import ReftuneError

_LAYER = re.compile(r"\.(\d+)(?:\.|$)")
_OPTIONS = ("act_fn", "add_bias")
_Skeleton = tuple[nn.Module, dict[str, torch.Size]]


@dataclass(frozen=True)
class SiteEdit:
    """One edit of an adapter: linear (``folded``), or not (``module``, which maps (rows, width) to the same).

    Attributes:
        block: module path of its block in the base model.
        layer: the block's number; None where the path has none.
        part: the positions that it serves: ``"both"``, or ``"prefix"`` or ``"suffix"`` of an untied pair.
        folded: the edit as (A, b, B) in float32.
        module: the edit itself, in evaluation, where it has no folded form.
    """

    block: str
    layer: int | None
    part: Part
    folded: FoldedEdit | None
    module: nn.Module | None = None

    @property
    def width(self) -> int:
        """Channels of the hidden state that the edit maps."""
        tensor = self.folded.A if self.folded is not None else max(self._tensors(), key=lambda t: t.shape[-1]).mT
        return tensor.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(tensor.nbytes for tensor in self._tensors())

    def _tensors(self) -> list[Tensor]:
        if self.folded is not None:
            return [self.folded.A, self.folded.b, self.folded.B]
        return list(self.module.state_dict().values()) if self.module is not None else []


@dataclass(frozen=True)
class FoldedAdapter:
    """An adapter, ready to be applied; immutable.

    Attributes:
        folder: where it was read.
        digest: of its configuration and weights (32 hexadecimal digits): equal digests are equal functions.
        positions: which tokens it edits.
        untied: whether prefix and suffix have an edit each.
        component: where in the block (see ``reftune.engine.sites``).
        layers: as configured: a number, a list or ``"all"``.
        base: the base model it says it was trained on.
        edits: one a site, in the order of the file; an untied pair's two are apart.
    """

    folder: Path
    digest: str
    positions: Positions
    untied: bool
    component: str
    layers: int | list[int] | str
    base: str | None
    edits: tuple[SiteEdit, ...] = field(repr=False)

    @property
    def linear(self) -> bool:
        """Whether every edit is folded."""
        return all(edit.folded is not None for edit in self.edits)

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(edit.nbytes for edit in self.edits)


def read_folded(folder: str | Path) -> FoldedAdapter:
    """Read an adapter folder.

    Raises:
        ReftuneError: no adapter there, a damaged file, values that are not finite, tensors or fields that do not fit
            one another, or an adapter that changes more than hidden states (``trained_beside_edits``).
    """
    folder = Path(folder).expanduser()
    config = read_adapter_config(folder)
    try:
        raw = (folder / WEIGHTS_FILE).read_bytes()
        tensors = load(raw)
    except (OSError, SafetensorError, KeyError) as error:
        check_weights_file(folder)
        raise ReftuneError(f"{folder / WEIGHTS_FILE} cannot be read ({error}); save the adapter again.") from None
    digest = hashlib.blake2b(json.dumps(config, sort_keys=True).encode(), digest_size=16)
    digest.update(raw)
    return fold_adapter(folder, config, tensors, digest.hexdigest())


def fold_adapter(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], digest: str) -> FoldedAdapter:
    """Fold an adapter whose files are read already.

    Args:
        folder: named in errors.
        config: as ``adapter_config.json`` holds it.
        tensors: as the weights file holds them; **a rotation may be made orthonormal in place**.
        digest: of both.

    Raises:
        ReftuneError: as ``read_folded``.
    """
    _check_fields(folder / CONFIG_FILE, config)
    positions = parse_positions(config["positions"])
    untied = config.get("share_weights", True) is False and positions.has_two_ends
    grouped: dict[tuple[str, Part], dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = EDIT_KEY.match(name)
        if match is None or (match["kind"] == "reft_suffix_edits" and not untied):
            raise ReftuneError(f"{folder / WEIGHTS_FILE}: {name} is no tensor of this adapter; save the adapter again.")
        part: Part = "both" if not untied else "suffix" if match["kind"] == "reft_suffix_edits" else "prefix"
        grouped.setdefault((match["block"], part), {})[match["tensor"]] = tensor
    layers = config.get("layers_to_transform", "all")
    blocks = list(dict.fromkeys(block for block, _ in grouped))
    wanted = len(blocks) if layers == "all" else len(layers) if isinstance(layers, list) else 1
    if not blocks or len(blocks) != wanted or len(grouped) != wanted * (2 if untied else 1):
        raise ReftuneError(
            f"{folder / WEIGHTS_FILE} holds {len(grouped)} edits at {len(blocks)} places; "
            f"layers_to_transform={layers!r} with share_weights={not untied} asks for others: the adapter was not "
            "saved whole."
        )
    edits = tuple(_site_edit(folder, config, block, part, held) for (block, part), held in grouped.items())
    base, component = config.get("base_model_name_or_path"), config.get("component", "block_output")
    return FoldedAdapter(folder, digest, positions, untied, component, layers, base, edits)


def _check_fields(path: Path, config: dict[str, Any]) -> None:
    """Refuse a configuration whose fields say nothing, or nothing that can be served from a bank."""
    kinds: dict[str, tuple[type, ...]] = {
        "method": (str,), "r": (int,), "positions": (str,), "component": (str,), "share_weights": (bool,),
        "layers_to_transform": (int, list, str),
    }  # fmt: skip
    required = ("method", "r", "positions")
    for name, types in kinds.items():
        value = config.get(name)
        if (value is None and name in required) or (value is not None and not isinstance(value, types)):
            raise ReftuneError(f"{path}: {name}={value!r} is no value for this field; the adapter must be saved again.")
    if beside := trained_beside_edits(config):
        raise ReftuneError(
            f"{path}: {beside}: this adapter replaces weights of the base model, which requests of other adapters use "
            "too. Serve it by itself, with PeftModel."
        )


def _site_edit(folder: Path, config: dict[str, Any], block: str, part: Part, held: dict[str, Tensor]) -> SiteEdit:
    where = f"{folder / WEIGHTS_FILE}: the edit at {block or 'the model'}"
    width = max((tensor.shape[-1] for tensor in held.values() if tensor.ndim), default=0)
    method, r = config["method"], config["r"]
    names = _OPTIONS if _is_ours(method) else (*_OPTIONS, "init", "parametrization")
    options = {name: config[name] for name in names if config.get(name)}
    with _drawing:
        edit, shapes = _skeleton(method, width, r, options)
        for name in sorted(shapes.keys() | held.keys()):
            found, expected = held.get(name), shapes.get(name)
            if found is None or expected is None or found.shape != expected or not found.is_floating_point():
                what = "nothing" if found is None else f"shape {tuple(found.shape)} ({found.dtype})"
                need = "nothing of that name" if expected is None else f"shape {tuple(expected)}"
                raise ReftuneError(f"{where} holds {what} for {name}; method={method!r} with r={r} has {need}.")
        floats = {name: tensor.float() for name, tensor in held.items()}
        if not all(bool(tensor.isfinite().all()) for tensor in floats.values()):
            raise ReftuneError(f"{where} holds values that are not finite: its training diverged. Train it again.")
        edit.load_state_dict(floats, strict=False, assign=True)
        if isinstance(edit, RotatedEdit) and config.get("parametrization") == "householder":
            edit.trust_rotation()
        numbers = _LAYER.findall(f".{block}")
        layer = int(numbers[-1]) if numbers else None
        if isinstance(edit, Edit) and edit.folds:
            return SiteEdit(block, layer, part, edit.fold())
        return SiteEdit(block, layer, part, None, edit.requires_grad_(False))


_drawing = threading.Lock()
"""Guards the skeletons, which every reader fills with its own tensors in turn."""
_skeletons: dict[tuple[Any, ...], _Skeleton] = {}


def _skeleton(method: str, width: int, r: int, options: dict[str, Any]) -> _Skeleton:
    """An edit without values, and the shapes of its tensors: kept for all that fold, made anew for each that does not.

    Making one costs more than all the arithmetic, for it draws random numbers first; ours do it on the meta device, and
    every generator is left where it was. ``init`` says only what is drawn.
    """
    key = (method, width, r, *sorted(options.items()))
    if key in _skeletons:
        return _skeletons[key]
    if _is_ours(method):
        with torch.device("meta"):
            edit = make_edit(method, width, r, **options, init="paper")
    else:
        with torch.random.fork_rng(devices=[]):
            edit = make_edit(method, width, r, **options)
    found = edit.eval(), {name: tensor.shape for name, tensor in edit.state_dict().items()}
    if isinstance(edit, Edit) and edit.folds:
        if len(_skeletons) >= 64:
            _skeletons.clear()
        _skeletons[key] = found
    return found


def _is_ours(method: str) -> bool:
    return edit_class(method).__module__.startswith("reftune.edits.")
