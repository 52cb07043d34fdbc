"""What an adapter's tensors must be before any is copied into a model, and a model that a refusal leaves as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from reftune.adapter.checkpoint import WRAPPING, not_finite
from reftune.engine.hooks import Engine
from reftune.errors import ReftuneError

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def under(model: Any) -> Any:
    """The model itself under PEFT's wrapping, if there is any (prompts are the wrapping's own, and keep it)."""
    return model.base_model.model if isinstance(getattr(model, "base_model", None), BaseTuner) else model


@contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """Whatever is refused in the ``with`` block leaves the model with the modules and adapters that it had."""
    engine, configs = Engine.of(model), model.__dict__.get("peft_config")
    interventions, known = dict(engine.interventions) if engine else {}, dict(configs or {})
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    children = [(module, dict(module._modules)) for module in model.modules()]
    owners = [module for module, _ in children if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    states = [
        (part, {k: copy(v) for k, v in vars(part).items() if isinstance(v, (dict, set, list, str)) and "hook" not in k})
        for owner in owners
        for part in owner.modules()
    ]
    try:
        yield
    except BaseException:
        if (now := Engine.of(model)) is not None and now is not engine:
            now.detach()
        for module, own in children:
            module._modules = own
        for part, state in states:
            vars(part).update(state)
        if engine is not None:
            engine.interventions = interventions
            engine.refresh()
        for parameter, required in trained:
            parameter.requires_grad = required
        if configs is not None:
            configs.clear()
            configs.update(known)
        else:
            for mark in ("peft_config", "_hf_peft_config_loaded"):  # the second is transformers', set before it adds
                vars(model).pop(mark, None)
        raise


def check_tensors(model: nn.Module, config: Any, adapter_name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Compare an adapter's tensors with what the model has for it, before any is copied.

    PEFT copies what fits by name and warns about the rest, which would leave edits at random values, or write over the
    base model. A file may hold the base's embeddings (``save_embedding_layers``): they must be this base's own, but for
    rows in their last half, which may be new tokens'.

    Args:
        model: the model or PEFT model with the adapter's edits in place.
        config: the adapter's configuration, for the message; **it forgets its file**, which is read by now.
        adapter_name: the adapter's name on this model.
        tensors: tensors by the model's own parameter names.

    Returns:
        The tensors to copy, an embedding's by the name that it has under the wrapping of this model's adapters.

    Raises:
        ReftuneError: a tensor that is missing, foreign, of another shape, not of floats, not finite, or another base's.
    """
    prefix = "base_model.model."
    state = {name.removeprefix(prefix): value for name, value in model.state_dict().items()}
    given = {name.removeprefix(prefix): name for name in tensors}
    marks = (f".reft_edits.{adapter_name}.", f".reft_suffix_edits.{adapter_name}.")
    edits = [name for name in state if any(mark in f".{name}" for mark in marks)]
    own, embeddings = _beside_edits(model, adapter_name)
    own |= set(edits)
    in_embeddings = [name for name in state if name.startswith(embeddings)]
    base_names = {WRAPPING.sub("", name): name for name in in_embeddings if name not in own}
    copies = {BaseTuner._remove_adapter_name_from_key(name, adapter_name) for name in in_embeddings} - state.keys()
    path, config.weights_file = getattr(config, "weights_file", None), None
    where = f"{path}: " if path is not None else ""
    base = getattr(config, "base_model_name_or_path", None)
    kept: dict[str, Tensor] = {}
    for name in [*edits, *(name for name in given if name not in edits)]:
        if name not in given:
            raise ReftuneError(
                f"{where}the adapter holds no tensor for {name}: its file is incomplete, or it was trained on another "
                f"base model than this one (trained on {base!r})."
            )
        found = tensors[given[name]]
        if name in copies:  # PEFT saves a trained embedding twice, and loads it by its other name
            continue
        here = name if name in own else base_names.get(WRAPPING.sub("", name))
        if here is None:
            raise ReftuneError(f"{where}{name} is no tensor of this adapter; save the adapter again.")
        value = state[here]
        if found.shape != value.shape:
            raise ReftuneError(
                f"{where}the adapter's {name} has shape {tuple(found.shape)}, this base model needs "
                f"{tuple(value.shape)}: it was trained on another base model ({base!r}), or on one that had been "
                "resized to a tokenizer, which must then be saved beside it."
            )
        if found.dtype not in _FLOATS and value.is_floating_point():
            raise ReftuneError(f"{where}{name} holds {found.dtype}, and {value.dtype} is needed; save it again.")
        if not bool(found.isfinite().all()):
            raise not_finite(path, name)
        if here not in own and _changes_old_rows(found, value):
            raise ReftuneError(
                f"{where}{name} is not this base model's, and the adapter's settings do not say that it was trained. "
                f"Load the adapter onto the base model that it was trained on ({base!r}), or train that module as "
                "modules_to_save or trainable_token_indices."
            )
        kept[given[name].removesuffix(name) + here] = found
    return kept


def _changes_old_rows(found: Tensor, value: Tensor) -> bool:
    """Whether an embedding differs from the base's, by more than its dtype, in its first half, which no resize adds."""
    if value.is_meta or torch.equal(found, value.to(found)):
        return False
    if not (found.is_floating_point() and value.is_floating_point()):
        return True
    kinds = [torch.finfo(found.dtype), torch.finfo(value.dtype)]
    rtol, atol = max(kind.eps for kind in kinds), max(kind.eps * kind.tiny for kind in kinds)
    old = slice(0, (len(found) + 1) // 2)
    return not torch.allclose(found[old].float(), value[old].to(found.device).float(), rtol=rtol, atol=atol)


def _beside_edits(model: nn.Module, adapter_name: str) -> tuple[set[str], tuple[str, ...]]:
    """What lies beside edits: names of an adapter's own tensors, of modules and tokens; how embeddings' names begin."""
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # pyright: ignore
    named = ("get_input_embeddings", "get_output_embeddings")
    embeddings = [getattr(base, name)() for name in named if hasattr(base, name)]
    modules = list(base.named_modules(remove_duplicate=False))
    return {
        f"{path}.{key}"
        for path, module in modules
        if isinstance(module, AuxiliaryTrainingWrapper)
        for key in module.adapter_state_dict_load_map(adapter_name).values()
    }, tuple(f"{path}." for path, module in modules if any(module is one for one in embeddings))
