"""``ReftConfig(representations=...)``: pyreft's way of saying where to edit and with what."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from torch import nn

from reftune.engine.sites import Site, find_sites
from reftune.errors import ReftuneError


class TaskType(str, Enum):
    """pyreft's task types."""

    SEQ_CLS = "SEQ_CLS"
    CAUSAL_LM = "CAUSAL_LM"


@dataclass(frozen=True)
class Representation:
    """One edited place.

    Attributes:
        component: a component's name or a module path in this library's spelling (``{layer}`` for the number).
        layer: the layer's number; None for a path without one.
        intervention: the edit there; None before a checkpoint's tensors are read.
        subspace_partition: ranges ``[[start, end], ...]`` of directions that ``subspaces`` then names by number.
    """

    component: str
    layer: int | None
    intervention: nn.Module | None
    subspace_partition: tuple[tuple[int, int], ...] | None = None

    def site(self, model: nn.Module) -> Site:
        """The place in a model.

        Raises:
            ReftuneError: the model has no such layer or component.
        """
        return find_sites(model, self.component, "all" if self.layer is None else self.layer)[0]


class ReftConfig:
    """Where to edit and with what.

    Args:
        representations: one mapping or a list of them, with the keys ``layer``, ``component`` (a name such as
            ``block_output``, or a path such as ``model.layers[8].output``), ``low_rank_dimension`` and ``intervention``
            (an object), and optionally ``subspace_partition``.
        positions: which tokens the adapter is saved for (``"l1"``, ``"f7+l7"``); pyreft keeps them in the data alone.
            The trainers fill it in from a dataset made by this module.
        **other: pyvene's settings, which have no meaning here.

    Raises:
        ReftuneError: a representation without component or intervention, or ranks that contradict each other.
    """

    def __init__(
        self,
        representations: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        positions: str | None = None,
        **other: Any,
    ) -> None:
        rows = [representations] if isinstance(representations, Mapping) else list(representations)
        if not rows:
            raise ReftuneError("representations=[]: name at least one place to edit.")
        self.representations: list[Representation] = [_read(row, index) for index, row in enumerate(rows)]
        self.positions: str | None = positions

    @classmethod
    def of(cls, representations: list[Representation], positions: str | None = None) -> ReftConfig:
        """A configuration of representations that are there already."""
        config = cls.__new__(cls)
        config.representations, config.positions = representations, positions
        return config


def _read(row: Mapping[str, Any], index: int) -> Representation:
    where = f"representations[{index}]"
    if not isinstance(row, Mapping) or "component" not in row:
        raise ReftuneError(f"{where}: give a mapping with layer, component, low_rank_dimension and intervention.")
    edit = row.get("intervention")
    if not isinstance(edit, nn.Module):
        raise ReftuneError(
            f"{where}: intervention={edit!r}: give an object, for example pyreft.LoreftIntervention("
            "embed_dim=model.config.hidden_size, low_rank_dimension=4)."
        )
    rank, stated = getattr(edit, "r", None), row.get("low_rank_dimension")
    if rank is not None and stated is not None and int(stated) != rank:
        raise ReftuneError(f"{where}: low_rank_dimension={stated}, but its intervention has {rank}.")
    component, layer = read_component(str(row["component"]), row.get("layer"))
    partition = row.get("subspace_partition")
    return Representation(component, layer, edit, partition and tuple((int(a), int(b)) for a, b in partition))


def read_component(component: str, layer: int | None) -> tuple[str, int | None]:
    """Pyvene's component as this library spells it.

    ``model.layers[8].output`` is ``block_output`` of layer 8, ``model.layers[8].mlp.output`` is
    ``model.layers.{layer}.mlp:output``; PEFT's wrapping (``base_model.model.``) is left out, and names stay.

    Returns:
        The component, and the layer (that of the path where it has one).
    """
    if not re.search(r"[.\[]", component):
        return component, None if layer is None else int(layer)
    path = re.sub(r"\[(\d+)\]", r".\1", component).removeprefix("base_model.model.")
    head, dot, side = path.rpartition(".")
    side = side if dot and side in ("input", "output") else ""
    path = head if side else path
    numbered = re.search(r"(?<=\.)\d+(?=\.|$)", path)
    if numbered is not None:
        path, layer = f"{path[: numbered.start()]}{{layer}}{path[numbered.end() :]}", int(numbered.group())
    else:
        layer = None
    side = side or "output"
    return (f"block_{side}" if path.endswith("{layer}") else f"{path}:{side}"), layer
