"""Edits on a model without PEFT: ``with reftune.attach(model, ...)``, and everything undone at the end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from torch import nn

from reftune.engine.hooks import CHANGING, EditSpec, Engine
from reftune.engine.intervention import Intervention, Placement
from reftune.engine.position_grammar import parse_positions
from reftune.engine.sites import Site
from reftune.errors import ReftuneError


class Attachment:
    """Edits attached to a model by ``attach``; a context manager that detaches them on leaving.

    Attributes:
        engine: the engine they belong to.
        name: the adapter name they share.
    """

    def __init__(self, engine: Engine, name: str):
        self.engine = engine
        self.name = name

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    @property
    def edits(self) -> dict[str, nn.Module]:
        """The edits by block path (``<path>:suffix`` for the second of an untied pair)."""
        return self.engine.edits(self.name)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The edits' parameters, for an optimiser."""
        for edit in self.edits.values():
            yield from edit.parameters()

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The base model, for the length of a ``with`` block."""
        found = [i for i in self.engine.interventions.values() if self.name in i.placements]
        already = [intervention for intervention in found if self.name in intervention.paused]
        try:
            for intervention in found:
                intervention.paused.add(self.name)
            yield
        finally:
            for intervention in found:
                if intervention not in already:
                    intervention.paused.discard(self.name)

    def detach(self) -> None:
        """Remove the edits; **changes the model**, whose outputs are bit-exactly the base's again."""
        self.engine.remove(self.name)


def _plain_intervention(block: nn.Module) -> Intervention:
    return Intervention()


def attach(
    model: nn.Module,
    *,
    method: str | type[nn.Module] = "loreft",
    r: int = 4,
    layers_to_transform: int | Sequence[int] | Literal["all"] = "all",
    component: str = "block_output",
    positions: str = "l1",
    share_weights: bool = True,
    edits: Mapping[Site, nn.Module] | None = None,
    name: str = "default",
    **options: Any,
) -> Attachment:
    """Attach edits to a model, without PEFT; **changes the model** until ``detach`` or the end of the ``with`` block.

    Args:
        model: any transformers model, or any ``nn.Module`` whose sites are named by module path.
        method: as in ``ReftConfig``.
        r: as in ``ReftConfig``.
        layers_to_transform: as in ``ReftConfig``.
        component: as in ``ReftConfig``.
        positions: as in ``ReftConfig``.
        share_weights: as in ``ReftConfig``.
        edits: ready-made edits by site, one a block, in place of ``method``, ``r``, ``layers_to_transform``,
            ``component``.
        name: the edits' name among those on this model; several attachments work together, in the order attached.
        options: further arguments of the edit: ``dropout``, ``act_fn``, ``init``, ``parametrization``.

    Returns:
        The attachment: its ``parameters()`` train, its ``disabled()`` gives the base, its ``detach()`` undoes all.

    Raises:
        ReftuneError: an unknown method, layer, component or position; a name already taken; a model under PEFT's ReFT.
    """
    with CHANGING:
        engine = Engine.of(model) or Engine(model, _plain_intervention)
        if engine.make_intervention is not _plain_intervention:
            raise ReftuneError(
                "This model carries a PEFT ReFT adapter: add another with model.add_adapter(name, ReftConfig(...))."
            )
        if name in engine.adapter_names():
            raise ReftuneError(f"name={name!r}: this model already has edits of that name; give these another name.")
        if edits is None:
            spec = EditSpec(method, r, layers_to_transform, component, positions, share_weights, options)
            engine.add(name, spec)
        else:
            try:
                for site, edit in edits.items():
                    engine.place(name, Placement(site, parse_positions(positions)), edit)
            except ReftuneError:
                engine.remove(name)
                raise
            engine.refresh()
        for intervention in engine.interventions.values():
            if name in intervention.placements:
                intervention.activate(name)
        return Attachment(engine, name)
