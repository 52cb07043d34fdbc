"""From causal analysis to adapters: an aligned subspace becomes a ReFT edit.

A LoReFT edit, h + R^T(Wh + b - Rh), is a distributed interchange whose source is not another input but learned: within
the subspace R, the state is replaced by Wh + b. An alignment gives R, and the states of inputs on which a variable has
the wanted value give b. With W = 0 the edit is then h + R^T(b - Rh): the interchange with those inputs' average.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from reftune.causal.aligned import Aligned
from reftune.causal.interchange import Inputs, Run, read
from reftune.edits.consreft import ConsreftEdit
from reftune.edits.loreft import LoreftEdit
from reftune.errors import ReftuneError


@torch.no_grad()
def subspace_target(
    model: nn.Module, aligned: Aligned, variable: str, examples: Inputs | Run
) -> Float[Tensor, " size"]:
    """The average coordinates, within a variable's subspace, of inputs on which it has the wanted value.

    Args:
        model: the network.
        aligned: a trained alignment at its location.
        variable: one of its variables.
        examples: inputs on all of which the variable has the value to steer to.
    """
    states = read(model, examples, aligned.location)[0].flatten(0, 1).float()
    return (states @ aligned.alignment.subspace(variable).rotation.float().to(states.device).mT).mean(0)


def from_das(
    model: nn.Module,
    aligned: Aligned,
    variable: str,
    target: Float[Tensor, " size"],
    *,
    positions: str,
    method: str = "consreft",
    adapter_name: str = "default",
) -> Any:
    """A steering adapter that sets an aligned variable: a PEFT model, to be run, trained on, saved and loaded as any.

    Args:
        model: the network that was analysed; **it gets the adapter**, as ``get_peft_model`` does it.
        aligned: a trained alignment at its location.
        variable: the variable to set.
        target: its coordinates, as ``subspace_target`` gives them.
        positions: which tokens the adapter edits (``"l1"``, ...): the place of the alignment, in an adapter's words.
        method: ``"consreft"`` (h + R^T(b - Rh)), or ``"loreft"``, which starts as the same function and can be
            trained to read the hidden state, too.
        adapter_name: its name.

    Raises:
        ReftuneError: a method with no rotation, a target of another size, or a location outside the layers.
    """
    from reftune.adapter.config import ReftConfig, new_adapter
    from reftune.adapter.tuner import ReftModel

    if method not in ("consreft", "loreft"):
        raise ReftuneError(f"method={method!r}: an alignment becomes 'consreft' or 'loreft', which own a rotation")
    rotation = aligned.alignment.subspace(variable).rotation
    if tuple(target.shape) != (len(rotation),):
        raise ReftuneError(f"target has shape {tuple(target.shape)}: {variable!r} has {len(rotation)} directions")
    if aligned.location.layer is None:
        raise ReftuneError(f"{aligned.location.component!r} names no layer: an adapter is attached to a layer")
    config = ReftConfig(
        method=method,
        r=len(rotation),
        layers_to_transform=[aligned.location.layer],
        component=aligned.location.component,
        positions=positions,
        init="paper" if method == "consreft" else "identity",  # a constant cannot start as the identity
    )
    adapted = new_adapter(model, config, adapter_name=adapter_name)
    assert isinstance(adapted.base_model, ReftModel)
    (edit,) = adapted.base_model.engine.edits(adapter_name).values()
    set_interchange(edit, rotation, target)
    return adapted


@torch.no_grad()
def set_interchange(edit: nn.Module, rotation: Float[Tensor, "size width"], target: Float[Tensor, " size"]) -> None:
    """**Overwrite an edit** so that it is the interchange h + R^T(b - Rh).

    Args:
        edit: a ``consreft`` or ``loreft`` edit of as many directions.
        rotation: R.
        target: b.
    """
    if not isinstance(edit, ConsreftEdit | LoreftEdit):
        raise ReftuneError(f"{type(edit).__name__} is no interchange: use 'consreft' or 'loreft'")
    edit.rotation.copy_(rotation)
    edit.bias.copy_(target)
    if isinstance(edit, LoreftEdit):
        edit.weight.zero_()
