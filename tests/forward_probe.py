"""Watching and changing what passes through a site while a tiny model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn

from reftune.engine.sites import Site, find_sites
from tests.tiny_models import TINY, tiny_inputs

STACKS = [
    (name, prefix)
    for name in TINY
    for prefix in {"t5": ["encoder.", "decoder."], "bart": ["encoder.", "decoder."], "llava": ["", "vision."]}.get(
        name, [""]
    )
]
HAS_CROSS_ATTENTION = {("t5", "decoder."), ("bart", "decoder.")}

_models: dict[str, tf.PreTrainedModel] = {}


def model_of(name: str) -> Any:
    """Built once: these tests leave no trace on a model."""
    if name not in _models:
        _models[name] = TINY[name]()
    return _models[name]


def seen_by(module: nn.Module, side: str, use: Callable[[Tensor], Tensor | None]) -> Any:
    """Hook `use` on the first tensor going into or coming out of `module`; a tensor that it returns takes its place."""

    def output_hook(_: nn.Module, __: Any, output: Any) -> Any:
        first = output if isinstance(output, Tensor) else output[0]
        new = use(first)
        return None if new is None else new if isinstance(output, Tensor) else (new, *output[1:])

    def input_hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        new = use(args[0] if args else kwargs["hidden_states"])
        if new is None:
            return None
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

    if side == "output":
        return module.register_forward_hook(output_hook)
    return module.register_forward_pre_hook(input_hook, with_kwargs=True)


@contextmanager
def hooks(model: nn.Module, uses: Iterable[tuple[Site, Callable[[Tensor], Tensor | None]]]) -> Iterator[None]:
    handles = [seen_by(model.get_submodule(site.module_path), site.side, use) for site, use in uses]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def record(name: str, sites: list[Site], model: Any = None, **changes: Any) -> list[Tensor]:
    """What a forward passes through each site, while `change` (a site and a function) is applied to another."""
    model = model_of(name) if model is None else model
    seen: list[Tensor | None] = [None] * len(sites)

    def keep(i: int) -> Callable[[Tensor], None]:
        def use(hidden: Tensor) -> None:
            seen[i] = hidden.detach().clone()

        return use

    uses: list[tuple[Site, Callable[[Tensor], Tensor | None]]] = [(site, keep(i)) for i, site in enumerate(sites)]
    if changes:
        uses.insert(0, (changes["at"], changes["by"]))
    with torch.no_grad(), hooks(model, uses):
        model(**tiny_inputs(name))
    assert all(tensor is not None for tensor in seen), "a site's module did not run"
    return [tensor for tensor in seen if tensor is not None]


def changed_at(hidden: Tensor, site: Site, position: int, amount: float = 1.0) -> Tensor:
    hidden = hidden.clone()
    columns = torch.arange(hidden.shape[-1])[site.index if site.columns is not None else slice(None)]
    hidden[:, position, columns] += amount * torch.linspace(0.5, 1.5, len(columns))
    return hidden


def sites_or_none(name: str, prefix: str, component: str) -> list[Site] | None:
    if component == "cross_attention_output" and (name, prefix) not in HAS_CROSS_ATTENTION:
        return None
    return find_sites(model_of(name), prefix + component)
