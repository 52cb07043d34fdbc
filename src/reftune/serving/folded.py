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
    LAYER,
    WEIGHTS_FILE,
    check_edit,
    edit_tensors,
    not_finite,
    read_adapter_config,
    read_weights,
    refuse_other_files,
    trained_beside_edits,
    weights_bytes,
)
from reftune.edits import Edit, FoldedEdit, RotatedEdit, edit_class, make_edit
from reftune.engine.position_grammar import Positions, parse_positions
from reftune.engine.positions import Part
from reftune.errors import ReftuneError
from reftune.users.store import user_of

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
        if self.folded is not None:
            return self.folded.A.shape[0]
        return max(tensor.shape[-1] for tensor in self._tensors() if tensor.ndim)

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
    """Read an adapter folder, or a user of a store where that is written as ``STORE/NAME``.

    Raises:
        ReftuneError: no adapter there, a damaged file, values that are not finite, tensors or fields that do not fit
            one another, or an adapter that changes more than hidden states (``trained_beside_edits``).
    """
    folder = Path(folder).expanduser()
    if (user := user_of(folder)) is not None:
        store, name = user
        tensors, content = store.read_with_digest(name)
        return fold_adapter(folder, store.config, tensors, content)
    config = read_adapter_config(folder)
    refuse_other_files(folder)
    try:
        raw = weights_bytes(folder / WEIGHTS_FILE)
        tensors = load(raw)
    except (OSError, SafetensorError, KeyError) as error:
        read_weights(folder, config)
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
    if beside := trained_beside_edits(config):
        raise ReftuneError(
            f"{folder / CONFIG_FILE}: {beside}: this adapter replaces weights of the base model, which requests of "
            "other adapters use too. Serve it by itself, with PeftModel."
        )
    path, positions = folder / WEIGHTS_FILE, parse_positions(config["positions"])
    names = edit_tensors(path, config, tensors)
    if foreign := tensors.keys() - {name for held in names.values() for name in held.values()}:
        raise ReftuneError(
            f"{path}: {min(foreign)} replaces an embedding of the base model, which requests of other adapters use "
            "too. Serve it by itself, with PeftModel."
        )
    untied = not config["share_weights"] and positions.has_two_ends
    grouped = {place: {own: tensors[name] for own, name in held.items()} for place, held in names.items()}
    layers = config["layers_to_transform"]
    # A weights file has its tensors in no order of their own.
    edits = tuple(_site_edit(folder, config, *place, grouped[place]) for place in sorted(grouped))
    base, component = config.get("base_model_name_or_path"), config["component"]
    return FoldedAdapter(folder, digest, positions, untied, component, layers, base, edits)


def _site_edit(folder: Path, config: dict[str, Any], block: str, part: Part, held: dict[str, Tensor]) -> SiteEdit:
    path = folder / WEIGHTS_FILE
    width = max((tensor.shape[-1] for tensor in held.values() if tensor.ndim), default=0)
    method, r = config["method"], config["r"]
    with _drawing:
        try:
            names = _OPTIONS if _is_ours(method) else (*_OPTIONS, "init", "parametrization")
            options = {name: config[name] for name in names if config.get(name)}
            edit, shapes = _skeleton(method, width, r, options)
        except ReftuneError as error:
            raise ReftuneError(f"{folder / CONFIG_FILE}: {error}") from None
        check_edit(path, block, config, shapes, {name: (t.shape, str(t.dtype)) for name, t in held.items()})
        floats = {name: tensor.float() for name, tensor in held.items()}
        for name, tensor in floats.items():
            if not bool(tensor.isfinite().all()):
                raise not_finite(path, f"{name} of the edit at {block or 'the model'}")
        edit.load_state_dict(floats, strict=False, assign=True)
        if isinstance(edit, RotatedEdit) and config.get("parametrization") == "householder":
            edit.trust_rotation()
        numbers = LAYER.findall(f".{block}")
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
