"""What would make prefix reuse inexact: each obstacle has one check and one reason."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from reftune.engine.forwards import is_causal_lm
from reftune.engine.hooks import Engine
from reftune.engine.tensor_parallel import parallel_mesh
from reftune.engine.transformers_names import checkpoints_activations
from reftune.training.sharding import sharded_by


def obstacle(model: Any, engine: Engine) -> str | None:
    """Why prefix reuse would be inexact on a model, or None."""
    if not is_causal_lm(model):
        return f"{type(model).__name__} is not a causal language model"
    stacks = {
        placement.site.stack
        for found in engine.interventions.values()
        for name, placement in found.placements.items()
        if name in found.active_names()
    }
    if len(stacks) != 1 or None in stacks or next(iter(stacks)).name != "":  # type: ignore[union-attr]
        return "its edits are not in the blocks of one language stack"
    stack = next(iter(stacks))
    assert stack is not None
    for module in (model, model.get_submodule(stack.owner_path)):
        if missing := missing_arguments(module):
            return f"the forward of {type(module).__name__} takes no {', '.join(missing)}"
    outside = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and ".reft_edits." not in name and ".reft_suffix_edits." not in name
    ]
    if outside:
        return f"{outside[0]} trains too, so what lies above it is not constant"
    for name, module in model.named_modules():
        if ".intervention" in f".{name}":
            continue
        rate = module.p if isinstance(module, nn.Dropout) else getattr(module, "attention_dropout", 0.0)
        if isinstance(rate, float) and rate > 0:
            return f"the base model has dropout ({name}: {rate}); set it to 0, or load the base without it"
    if checkpoints_activations(model):
        return "gradient checkpointing is on"
    # What accelerate keeps in memory or on disk is brought to the one device that computes.
    if len(set((getattr(model, "hf_device_map", None) or {}).values()) - {"cpu", "disk"}) > 1:
        return "the model computes on several devices"
    return cache_obstacle(model.config) or rope_obstacle(model.config)


def sharding_obstacle(model: nn.Module) -> str | None:
    """Why blocks cannot be run by themselves in a model's distributed wrapping, or None."""
    if parallel_mesh(model) is not None:
        return "under tensor parallelism all processes run the same blocks, and each would have a store of its own"
    sharding = sharded_by(model)
    return sharding and f"{sharding} shards the parameters, and gathers them for the whole model's forward alone"


def cache_obstacle(config: Any) -> str | None:
    """Why a model's cache layers cannot hold a prefix for reuse, or None."""
    layers = DynamicCache(config=config).layers
    kinds = {type(layer) for layer in layers}
    if not layers or not kinds <= {DynamicLayer, DynamicSlidingWindowLayer}:
        return (
            f"its cache has layers of other kinds than keys and values ({', '.join(sorted(k.__name__ for k in kinds))})"
        )
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if getattr(text, "num_kv_shared_layers", 0):
        return "its layers share keys and values"
    return None


def rope_obstacle(config: Any) -> str | None:
    """Why a model's rotary embedding depends on the length of the row, or None."""
    found: set[str] = set()

    def collect(value: Any) -> None:
        if isinstance(value, dict):
            for name, inner in value.items():
                if name in ("rope_type", "type"):
                    found.add(str(inner))
                collect(inner)

    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for name in ("rope_parameters", "rope_scaling"):
        collect(getattr(text, name, None))
    changing = found & {"dynamic", "longrope"}
    return f"its rotary embedding ({', '.join(changing)}) changes with the length of the row" if changing else None


def missing_arguments(module: nn.Module) -> list[str]:
    """Arguments that a partial forward needs and this module's forward does not take."""
    names = inspect.signature(module.forward).parameters
    return [
        name for name in ("inputs_embeds", "attention_mask", "position_ids", "past_key_values") if name not in names
    ]
