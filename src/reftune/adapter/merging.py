"""The one case in which an edit is a weight: the same vector at every token, into a bias that exists."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from reftune.edits import LobireftEdit
from reftune.engine.hooks import Engine
from reftune.errors import ReftuneError


@torch.no_grad()
def merge_constant(engine: Engine, names: list[str], safe: bool = False) -> None:
    """Add constant edits to the biases of the modules they sit on; **changes the model's weights**, or nothing at all.

    Args:
        engine: the engine whose adapters are merged.
        names: the adapters.
        safe: refuse values that are not finite.

    Raises:
        ReftuneError: an adapter that is not on the model or depends on the token or its position, a site without a
            bias, or values that are not finite.
    """
    unknown = [name for name in names if name not in engine.adapter_names()]
    if unknown:
        raise ReftuneError(f"adapter_names: {unknown} not on this model, which has {engine.adapter_names()}.")
    merges: list[tuple[Tensor, Tensor]] = []
    for name in names:
        for intervention in engine.interventions.values():
            placement = intervention.placements.get(name)
            if placement is None:
                continue
            edit = intervention.reft_edits[name]
            if not placement.positions.everywhere:
                raise ReftuneError(
                    f"adapter {name!r} edits at positions={placement.positions.text!r}: it acts on some tokens and not "
                    "on others, which no weight does, so ReFT at positions cannot be merged. Keep the adapter attached "
                    "(decode steps then cost nothing), or use unload() to go back to the base model."
                )
            if not isinstance(edit, LobireftEdit):
                raise ReftuneError(
                    f"adapter {name!r} is a {type(edit).__name__}: what it adds depends on the hidden state itself, in "
                    "the residual stream and after every sum, where no weight stands. Only lobireft, a constant, can "
                    "be merged."
                )
            module = engine.model.get_submodule(placement.site.module_path)
            bias = getattr(module, "bias", None)
            if placement.site.side != "output" or not isinstance(bias, nn.Parameter):
                raise ReftuneError(
                    f"adapter {name!r} edits the {placement.site.side} of {placement.site.module_path}, which has no "
                    "bias to take a constant. Use a component whose module has one, such as mlp_output in GPT-2 or OPT."
                )
            folded = edit.fold()
            constant = placement.scale * (folded.b @ folded.B)
            if safe and not bool(constant.isfinite().all()):
                raise ReftuneError(
                    f"adapter {name!r} holds values that are not finite at {placement.site.module_path}."
                )
            merges.append((bias.data if placement.site.index is None else bias.data[placement.site.index], constant))
    for bias, constant in merges:
        bias += constant.to(bias)
