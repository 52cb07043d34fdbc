"""Where edits go: the names of places in a network, found by structure and not by the model's name.

A *block* is one layer of a transformer and a *stack* is the list of them. What each component names:

| component | tensor | hook |
|---|---|---|
| `block_output` | the residual stream after the block | block, output |
| `block_input` | the residual stream before the block | block, input |
| `attention_input` | what self-attention reads; where a norm comes first, after it | module of the projections, input |
| `query_output`, `key_output`, `value_output` | before any q/k norm and rotary embedding | projection, output |
| `head_output[0]`, `head_output[0,3]` | these heads' results, side by side | output projection, input |
| `attention_output` | self-attention's term of the residual sum | output projection, output |
| `cross_attention_output` | cross-attention's term of the residual sum | output projection, output |
| `mlp_input` | what the feed-forward reads | feed-forward (or up projection), input |
| `mlp_output` | the feed-forward's term of the residual sum | down projection, output |
| `model.layers.{layer}.mlp.act_fn:input` | any module's input or (the default) output | that module |

Where a model normalises a branch before adding it (Gemma 2, OLMo 2), `attention_output` and `mlp_output` come before
that norm. The down projection stands for the feed-forward because BLOOM and MPT add the residual inside their `mlp`; a
mixture of experts has no single one, there it is the output (the first, if several) of the whole module. Where one
matrix computes queries, keys and values, a site covers the columns of one of the three.

A model with several stacks names them by a prefix: `encoder.`, `decoder.`, `language.`, `vision.`; without a prefix a
vision-language model means its language stack. A module path may begin with the same word, as in
`encoder.block.{layer}.layer.0`: it is a prefix only if one of the names above follows.
"""

from __future__ import annotations

import difflib
import operator
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, SupportsIndex

from torch import nn

from reftune.engine.blocks import (
    CHILD,
    Block,
    Columns,
    MissingError,
    UnclearError,
    inside,
    is_attention,
    join,
    leaf_channels,
    parent,
    walk,
)
from reftune.errors import ReftuneError

Side = Literal["input", "output"]
Layers = int | Sequence[int] | str

COMPONENTS = (
    "block_output", "block_input", "attention_input", "query_output", "key_output", "value_output", "attention_output",
    "cross_attention_output", "mlp_input", "mlp_output",
)  # fmt: skip
"""Every component without an argument; `head_output[...]` and module paths come on top."""

_HEADS = re.compile(r"head_output\[\s*(-?\d+(?:\s*,\s*-?\d+)*)\s*\]")


@dataclass(frozen=True)
class Stack:
    """One list of blocks.

    Attributes:
        name: `""` if it is the only one, else `"encoder"`, `"decoder"`, `"language"`, `"vision"`, ...
        module_path: Path of the list.
        owner_path: Path of the module that owns the list and whose forward runs the blocks.
        block_paths: Path of every block, in order.
    """

    name: str
    module_path: str
    owner_path: str
    block_paths: tuple[str, ...]


@dataclass(frozen=True)
class Site:
    """One place for one edit: a module, a side of it, and the channels concerned.

    Attributes:
        component: The component as it was asked for.
        layer: Number of the block; None for a module path without `{layer}`.
        block_path: The module that carries the trainable child: the block, or outside all blocks the module itself.
        module_path: The module to hook.
        side: Whether its input or its output is edited; of several tensors, the first. It ends in the channels; the
            tokens before may be flattened, as (batch * sequence, channels) in OPT's feed-forward.
        width: How many channels the edit sees.
        columns: Those channels of the hooked tensor, in order; None means all of them.
        channels: How many the hooked tensor has; 0: not known.
        stack: The stack that the block belongs to, if any.
    """

    component: str
    layer: int | None
    block_path: str
    module_path: str
    side: Side
    width: int
    columns: Columns | None
    channels: int
    stack: Stack | None

    @property
    def index(self) -> slice | list[int] | None:
        """`columns` as an index, `tensor[..., site.index]`: a slice, hence a view, where they adjoin."""
        if isinstance(self.columns, range):
            return slice(self.columns.start, self.columns.stop)
        return None if self.columns is None else list(self.columns)


def find_stacks(model: nn.Module) -> list[Stack]:
    """Every list of blocks in `model`: the outermost `ModuleList` or `Sequential` around each attention module."""
    modules = dict(walk(model))
    attentions = [path for path, module in modules.items() if is_attention(module)]
    lists: dict[str, None] = {}
    for attention in attentions:
        parts = attention.split(".")
        outer = (join(*parts[:depth]) for depth in range(len(parts)))
        if (found := next((p for p in outer if _is_block_list(modules[p], p, attentions)), None)) is not None:
            lists[found] = None
    return [
        Stack(name, path, parent(path), tuple(join(path, child) for child, _ in modules[path].named_children()))
        for path, name in _stack_names(list(lists)).items()
    ]


def resolve_layers(layers: object, count: int, field: str = "layers_to_transform", noun: str = "layer") -> list[int]:
    """Layer numbers from 0, in the order given; negative numbers count from the end.

    Raises:
        ReftuneError: Not a number, a list of numbers or `"all"`; a number out of range or named twice; none at all.
    """
    if layers == "all":
        return list(range(count))
    listed = layers if isinstance(layers, Sequence) and not isinstance(layers, str) else [layers]
    numbers = [operator.index(n) for n in listed if isinstance(n, SupportsIndex) and not isinstance(n, bool)]
    if len(numbers) < len(listed):
        raise ReftuneError(f'{field}={layers!r}: expected a {noun} number, a list of them or "all"')
    if not numbers:
        raise ReftuneError(f'{field}=[]: name at least one {noun}, or "all"')
    if wrong := [n for n in numbers if not -count <= n < count]:
        raise ReftuneError(f"{field}={wrong}: this model has {count} {noun}s, 0 to {count - 1}")
    resolved = [n % count for n in numbers]
    if twice := [n for n in resolved if resolved.count(n) > 1]:
        raise ReftuneError(f"{field}={numbers}: {noun} {twice[0]} is named twice")
    return resolved


def find_sites(model: nn.Module, component: str = "block_output", layers_to_transform: Layers = "all") -> list[Site]:
    """The sites that `component` names in the given layers, in the order of the layers given.

    In a model whose layers differ (attention in some, another mixer in the rest), `"all"` means those that have it.

    Raises:
        ReftuneError: An unknown component or layer, or one that this architecture does not have.
    """
    stacks = find_stacks(model)
    prefix, name = _split_prefix(component)
    heads = _HEADS.fullmatch(name)
    if name not in COMPONENTS and not heads:
        return _path_sites(model, component, layers_to_transform, stacks)
    stack = _choose_stack(component, prefix, name, stacks)

    def site(layer: int) -> Site:
        path = stack.block_paths[layer]
        block = Block(model.get_submodule(path), _config(model, path))
        if heads:
            numbers = resolve_layers([int(n) for n in heads[1].split(",")], block.heads(), "head_output", "head")
            columns = block.head_columns(numbers)
            module, side, width = block.output_projection(), "input", len(columns)
        else:
            module, side, width, columns = _locate(block, name)
        channels = width if columns is None else block.features(module)[side == "output"]
        return Site(component, layer, path, join(path, module), side, width, columns, channels, stack)

    return _collect(site, layers_to_transform, len(stack.block_paths), component)


def attention_module(block: nn.Module, cross: bool = False) -> nn.Module | None:
    """The module of `block` that holds the projections of self- or cross-attention; None if not exactly one does."""
    try:
        path = Block(block).attention_or_none(cross)
    except MissingError:  # several: none of them is *the* attention
        return None
    return None if path is None else block.get_submodule(path)


def _locate(block: Block, name: str) -> tuple[str, Side, int, Columns | None]:
    """Module path inside the block, side, width and columns of a component without an argument."""
    match name:
        case "block_output":
            return "", "output", block.width_at("output"), None
        case "block_input":
            return "", "input", block.width_at("input"), None
        case "attention_input":
            return block.attention(), "input", block.attention_width(), None
        case "attention_output" | "cross_attention_output":
            path = block.output_projection(cross=name.startswith("cross"))
            return path, "output", block.features(path)[1], None
        case "query_output" | "key_output" | "value_output":
            path, width, columns = block.projection({"q": "q", "k": "k", "v": "v"}[name[0]])  # pyright: ignore
            return path, "output", width, columns
        case "mlp_input":
            return block.feed_forward()[0], "input", block.width(), None
        case _:
            return block.feed_forward()[1], "output", block.width(), None


def _collect(site: Callable[[int], Site], layers: Layers, count: int, component: str) -> list[Site]:
    """`site` of every layer asked for; of `"all"`, of every layer that has one."""
    sites: list[Site] = []
    refusal = ""
    for layer in resolve_layers(layers, count):
        try:
            sites.append(site(layer))
        except MissingError as reason:
            refusal = f"component={component!r}: layer {layer} of this model has no such place: {reason}"
            if layers != "all" or isinstance(reason, UnclearError):
                raise ReftuneError(refusal) from None
    if not sites:
        raise ReftuneError(refusal)
    return sites


def _split_prefix(component: str) -> tuple[str, str]:
    prefix, dot, name = component.rpartition(".")
    return (prefix, name) if dot and (name in COMPONENTS or _HEADS.fullmatch(name)) else ("", component)


def _choose_stack(component: str, prefix: str, name: str, stacks: list[Stack]) -> Stack:
    named = {stack.name: stack for stack in stacks}
    if not stacks:
        raise ReftuneError(f"component={component!r}: this model has no list of blocks with attention in them")
    if prefix in named:
        return named[prefix]
    if not prefix and "language" in named:
        return named["language"]
    if len(stacks) == 1:
        raise ReftuneError(f"component={component!r}: this model has one stack of blocks, write {name!r}")
    choices = " or ".join(repr(f"{stack}.{name}") for stack in named)
    raise ReftuneError(f"component={component!r}: this model has several stacks of blocks, write {choices}")


def _is_block_list(module: nn.Module, path: str, attentions: list[str]) -> bool:
    if not isinstance(module, nn.ModuleList | nn.Sequential):
        return False
    # A Sequential may also chain a whole model and its head: as a stack, every member has attention.
    members = [join(path, name) for name, _ in module.named_children()]
    if any(isinstance(child, nn.ModuleList) for child in module.children()):
        return False  # lists of lists (PVT): the inner ones hold the blocks that run
    return isinstance(module, nn.ModuleList) or all(any(inside(a, m) for a in attentions) for m in members)


def _stack_names(paths: list[str]) -> dict[str, str]:
    """Names for the stacks at these paths: by kind of input, then encoder and decoder, then the path itself."""
    kinds = {path: _first_of(path, _KINDS) or "language" for path in paths}
    halves = {path: _first_of(path, _HALVES) for path in paths}
    names: dict[str, str] = {}
    for path in paths:
        alike = [p for p in paths if kinds[p] == kinds[path]]
        kind = kinds[path] if len(set(kinds.values())) > 1 else ""
        half = halves[path] if len(alike) > 1 else ""
        names[path] = (
            join(kind, half) if sum(halves[p] == halves[path] for p in alike) == 1 or len(alike) == 1 else path
        )
    return names


_KINDS = {"vision": r"vision|visual|image", "audio": r"audio|speech", "qformer": r"qformer"}
_HALVES = {"encoder": "encoder", "decoder": "decoder"}


def _first_of(path: str, patterns: dict[str, str]) -> str:
    found = {name: match.start() for name, pattern in patterns.items() if (match := re.search(pattern, path))}
    return min(found, key=found.__getitem__) if found else ""


def _config(model: nn.Module, path: str) -> object:
    """The config of the nearest module around `path` that has one."""
    while True:
        if (config := getattr(model.get_submodule(path), "config", None)) is not None or not path:
            return config
        path = parent(path)


def _path_sites(model: nn.Module, component: str, layers: Layers, stacks: list[Stack]) -> list[Site]:
    """The sites of a module path, with `{layer}` one for every layer asked for, without it one in all."""
    path, side = _split_side(component)
    modules = {p: m for p, m in model.named_modules(remove_duplicate=False) if CHILD not in p.split(".")}

    def site(layer: int | None, block: str, target: str, stack: Stack | None) -> Site:
        _refuse_unless_hookable(component, target, modules, stacks)
        if stack is None:
            width, inner = leaf_channels(modules[target], side), Block(modules[target], _config(model, target))
            if width is None and any(map(inner.attentions, (False, True))):
                width = inner.channels("", side)
            if width is None:
                kind = type(modules[target]).__name__
                raise ReftuneError(f"component={component!r}: the width of the {side} of a {kind} here is not known")
        else:
            relative = target[len(block) + 1 :]
            width = Block(modules[block], _config(model, block)).channels(relative, side)
        return Site(component, layer, block, target, side, width, None, width, stack)

    if "{layer}" not in path:
        target = _resolve(component, path, modules, modules)
        if layers != "all":
            message = f"{component!r} names one module; leave it out, or write the layer's number as {{layer}}"
            raise ReftuneError(f"layers_to_transform={layers!r}: {message}")
        for stack in stacks:
            for block in stack.block_paths:
                if inside(target, block):
                    return [site(None, block, target, stack)]
        return [site(None, target, target, None)]

    head, _, tail = path.partition("{layer}")
    if "{layer}" in tail or head[-1:] not in ("", ".") or tail[:1] not in ("", "."):
        raise ReftuneError(f"component={component!r}: write {{layer}} once, as one step of the path")
    lists = [p for p, m in modules.items() if isinstance(m, nn.ModuleList | nn.Sequential)]
    found = _resolve(component, head.rstrip("."), modules, lists)
    blocks = [join(found, name) for name, _ in modules[found].named_children()]
    stack = next((s for s in stacks if s.module_path == found), None)
    tail = tail.lstrip(".")
    if not any(join(block, tail) in modules for block in blocks):
        raise ReftuneError(_unknown(component, modules))

    def site_of_layer(layer: int) -> Site:
        target = join(blocks[layer], tail)
        if target not in modules:
            raise MissingError(f"there is no module {target!r}")
        return site(layer, blocks[layer], target, stack)

    return _collect(site_of_layer, layers, len(blocks), component)


def _split_side(component: str) -> tuple[str, Side]:
    path, colon, side = component.partition(":")
    if colon and side not in ("input", "output"):
        raise ReftuneError(f"component={component!r}: after the colon comes input or output")
    return path, "input" if side == "input" else "output"


def _resolve(component: str, path: str, modules: Mapping[str, nn.Module], among: Collection[str]) -> str:
    """`path` itself or, where the model is wrapped or is a bare backbone, the one module that it can only mean."""
    if path in among:
        return path
    # A backbone lacks the beginning: `model.layers.3` of the whole model is `layers.3` there.
    beginning = f"{getattr(modules[''], 'base_model_prefix', '')}."
    if path.startswith(beginning) and path[len(beginning) :] in among:
        return path[len(beginning) :]
    ends = [p for p in among if path and p.endswith("." + path)]
    if len(ends) > 1:
        raise ReftuneError(f"component={component!r}: several modules end with {path!r}: {', '.join(ends[:4])}")
    if not ends:
        raise ReftuneError(_unknown(component, modules))
    return ends[0]


def _refuse_unless_hookable(component: str, path: str, modules: Mapping[str, nn.Module], stacks: list[Stack]) -> None:
    if isinstance(modules[path], nn.ModuleList | nn.ModuleDict) or any(inside(s.module_path, path) for s in stacks):
        raise ReftuneError(f"component={component!r}: {path!r} holds whole blocks or modules, name one of them")


def _unknown(component: str, modules: Mapping[str, nn.Module]) -> str:
    """What to write instead of a component that names nothing."""
    templates = {re.sub(r"(^|\.)\d+(?=\.|$)", r"\1{layer}", path) for path in modules if path}
    name = component.rpartition(".")[2] if "{" not in component else component
    close = difflib.get_close_matches(name, [*COMPONENTS, "head_output[0]"], 1) or difflib.get_close_matches(
        component.partition(":")[0], sorted(templates), 1
    )
    hint = f", did you mean {close[0]!r}?" if close else "."
    choices = ", ".join(COMPONENTS)
    example = next((t for t in sorted(templates) if "{layer}" in t and t.count(".") > 2), "layers.{layer}.mlp")
    return (
        f"component={component!r}: this model has no such place{hint} "
        f"There are {choices}, head_output[0], and module paths such as {example!r}"
    )
