"""What one transformer block consists of: its attention, its projections, its feed-forward; found by structure.

Projections are told by the usual names of their *role* (`q_proj`, `query`, `q_lin`), never by the model's name, with
two small tables for what structure cannot tell: how a fused projection orders queries, keys and values, and which
classes depart from that.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import nn

from reftune.errors import ReftuneError

Columns = range | tuple[int, ...]

CHILD = "intervention"
"""The container that the engine puts into a block: never part of the architecture."""

_ROLES = {"q": "q", "query": "q", "k": "k", "key": "k", "v": "v", "value": "v"}
_AFFIXES = re.compile(r"^(to_|linear_|project_|w)(?=[a-z])|_(proj|lin|projection|layer)$")
_CROSS = re.compile(r"cross|enc_?dec|encoder_att", re.IGNORECASE)
_OUTPUT = (
    "o_proj", "out_proj", "dense", "c_proj", "o", "out_lin", "Wo", "wo", "proj", "projection", "to_out", "to_out.0",
    "linear_out", "output.dense", "projection_layer", "output",
)  # fmt: skip
_DOWN = (
    "down_proj", "c_proj", "fc2", "fc_out", "dense_4h_to_h", "wo", "Wo", "lin2", "w2", "linear2",
    "linear_2", "output.dense",
)  # fmt: skip

# The order of the three, and how often that order repeats along the columns. "kv_heads": once for every key/value head,
# its queries first (GPT-NeoX, BLOOM; Falcon's three variants are this with as many, some, or one key/value head).
Layout = tuple[str, int | Literal["kv_heads"]]
_FUSED: dict[str, Layout] = {
    "c_attn": ("qkv", 1),
    "qkv": ("qkv", 1),
    "qkv_proj": ("qkv", 1),
    "qkv_linear": ("qkv", 1),
    "Wqkv": ("qkv", 1),
    "query_key_value": ("qkv", "kv_heads"),
    "in_proj": ("qkv", "kv_heads"),
}
_FUSED_BY_CLASS: dict[str, Layout] = {
    "CodeGenAttention": ("qvk", 4),
    "GPTBigCodeAttention": ("qkv", "kv_heads"),
    "MiniMaxLightningAttention": ("qkv", "kv_heads"),
}


class MissingError(ReftuneError):
    """This block has no such part; other blocks of the model may have it."""


class UnclearError(MissingError):
    """This block has such a part, but not one of tokens and channels: not to be passed over where all are meant."""


def walk(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every module of the architecture with its path: linear layers as one, whatever wraps them; no interventions."""
    yield path, module
    if linear_features(module) is None:
        for name, child in module.named_children():
            if name != CHILD:
                yield from walk(child, join(path, name))


def device_of(block: nn.Module) -> torch.device | None:
    """Where a block computes: its parameters' device; where accelerate keeps them elsewhere, that on which it runs."""
    parameter = next((p for n, p in block.named_parameters() if CHILD not in n.split(".")), None)
    if parameter is None or not parameter.is_meta:
        return None if parameter is None else parameter.device
    for name, module in block.named_modules():
        hook = getattr(module, "_hf_hook", None)
        for one in getattr(hook, "hooks", [hook]):
            if CHILD not in name.split(".") and (device := getattr(one, "execution_device", None)) is not None:
                return torch.device(device)
    return None


def linear_features(module: nn.Module) -> tuple[int, int] | None:
    """Channels in and out of a linear layer (quantised, transposed as GPT-2's, or wrapped by an adapter), or None."""
    for names in (("in_features", "out_features"), ("nx", "nf")):
        features = tuple(getattr(module, name, None) for name in names)
        if all(isinstance(n, int) for n in features):
            return features  # pyright: ignore[reportReturnType]
    # An adapter's wrapper, and the clipping one of some quantisation-aware models.
    inner = getattr(module, "base_layer", None)
    if inner is None and type(module).__name__.endswith("Linear"):
        inner = getattr(module, "linear", None)
    return linear_features(inner) if isinstance(inner, nn.Module) else None


def is_attention(module: nn.Module) -> bool:
    """Whether `module` itself holds query, key and value projections."""
    roles = projection_roles(module)
    return "qkv" in roles or ("q" in roles and ("v" in roles or "kv" in roles))


def projection_roles(module: nn.Module) -> dict[str, str]:
    """Names of the projections held by `module`, by role: q, k, v, or qkv for a fused one."""
    roles: dict[str, str] = {}
    for name, child in module.named_children():
        if name == CHILD or linear_features(child) is None:
            continue
        if name in _FUSED:
            # Recurrent mixers have an `in_proj` as well.
            if name != "in_proj" or "attention" in type(module).__name__.lower():
                roles["qkv"] = name
        elif (role := _ROLES.get(_AFFIXES.sub("", _AFFIXES.sub("", name)))) is not None:
            roles.setdefault(role, name)
        elif name == "kv_b_proj":  # latent attention: keys and values share one projection from a latent vector
            roles["kv"] = name
        elif name in ("q_b_proj", "q_attn"):
            roles.setdefault("q", name)
    if "qkv" in roles and "q" in roles:  # GPT-2's cross-attention keeps keys and values in `c_attn`
        roles["kv"] = roles.pop("qkv")
    return roles


def leaf_channels(module: nn.Module, side: Literal["input", "output"]) -> int | None:
    """Channels of a linear layer, a norm, or the output of an embedding; None for every other module."""
    if (features := linear_features(module)) is not None:
        return features[side == "output"]
    if isinstance(width := getattr(module, "embedding_dim", None), int):
        return width if side == "output" else None
    if isinstance(shape := getattr(module, "normalized_shape", None), tuple):
        return shape[-1]
    weight = getattr(module, "weight", None)
    return weight.shape[0] if isinstance(weight, torch.Tensor) and weight.dim() == 1 else None


def is_parameterless_activation(path: str, module: nn.Module) -> bool:
    """Whether this is the non-linearity of a feed-forward, by its usual names."""
    return "act" in re.split(r"[._]|ivation", path.rpartition(".")[2]) and not any(True for _ in module.parameters())


def join(*parts: str) -> str:
    """A module path of its parts, empty ones left out."""
    return ".".join(part for part in parts if part)


def parent(path: str) -> str:
    """The path one level up; of a top-level name, the empty path."""
    return path.rpartition(".")[0]


def inside(path: str, ancestor: str) -> bool:
    """Whether `path` is `ancestor` or lies in it."""
    return not ancestor or path == ancestor or path.startswith(ancestor + ".")


def common_ancestor(first: str, second: str) -> str:
    """The deepest module path that holds both (or is one of them)."""
    while not inside(second, first):
        first = parent(first)
    return first


def as_columns(numbers: Sequence[int]) -> Columns:
    """A range where the numbers adjoin, so that indexing takes a view."""
    run = range(numbers[0], numbers[0] + len(numbers))
    return run if list(run) == list(numbers) else tuple(numbers)


class Block:
    """One block, seen as its parts; every path is relative to the block."""

    def __init__(self, block: nn.Module, config: object = None) -> None:
        """`config` is the model's, for the number of heads where the attention module does not say it."""
        self.config = config
        self.modules = dict(walk(block))

    def features(self, path: str) -> tuple[int, int]:
        """Channels in and out of the linear layer at `path`."""
        features = linear_features(self.modules[path])
        if features is None:
            raise MissingError(f"{path!r} is not a linear layer")
        return features

    def attentions(self, cross: bool = False) -> list[str]:
        """The modules that hold the projections of self- or cross-attention; a stage of blocks has several."""
        return [p for p, m in self.modules.items() if is_attention(m) and bool(_CROSS.search(p)) == cross]

    def attention_or_none(self, cross: bool = False) -> str | None:
        """The module that holds the projections of self- or cross-attention."""
        found = self.attentions(cross)
        if len(found) > 1:
            raise UnclearError(f"it has several attention modules ({', '.join(found)}): name one by a module path")
        return found[0] if found else None

    def attention(self, cross: bool = False) -> str:
        """As `attention_or_none`, an error if there is none."""
        path = self.attention_or_none(cross)
        if path is None:
            raise MissingError(f"it has no {'cross' if cross else 'self'}-attention with query and value projections")
        return path

    def roles(self, cross: bool = False) -> dict[str, str]:
        """Paths of the attention's projections by role."""
        attention = self.attention(cross)
        return {role: join(attention, name) for role, name in projection_roles(self.modules[attention]).items()}

    def output_projection(self, cross: bool = False) -> str:
        """In the attention module or, as in BERT, beside it."""
        attention = self.attention(cross)
        path = self._output_projection_or_none(attention)
        if path is None:
            raise MissingError(f"no output projection was found for {attention!r}: name it by a module path")
        return path

    def _output_projection_or_none(self, path: str) -> str | None:
        while path:
            for name in _OUTPUT:
                found = join(path, name)
                if found in self.modules and linear_features(self.modules[found]):
                    return found
            path = parent(path)
        return None

    def attention_width(self) -> int:
        """Channels that attention reads."""
        roles = self.roles()
        return self.features(roles["qkv"] if "qkv" in roles else roles.get("k") or roles["q"])[0]

    def width(self) -> int:
        """Channels of the residual stream."""
        for cross in (False, True):
            for attention in self.attentions(cross):
                if path := self._output_projection_or_none(attention):
                    return self.features(path)[1]
        for name in ("hidden_size", "d_model", "n_embd", "dim"):
            if isinstance(width := getattr(self.config, name, None), int):
                return width
        raise MissingError("the width of its residual stream is not known")

    def width_at(self, side: Literal["input", "output"]) -> int:
        """Channels of what the block reads or yields: a stage of a vision transformer may end in a layer that widens.

        Raises:
            UnclearError: A stage that convolves by itself, which passes maps (batch, channels, height, width).
        """
        attentions = [*self.attentions(), *self.attentions(cross=True)]
        for name, child in self.modules[""].named_children():
            if not any(inside(attention, name) for attention in attentions) and any(map(_is_patching, child.modules())):
                raise UnclearError(
                    f"its {name!r} convolves images, so its states are maps that do not end in their channels: "
                    "name a module inside it by a path"
                )
        merging = self.modules.get("downsample") if side == "output" else None
        linears = [f for m in merging.modules() if (f := linear_features(m))] if merging is not None else []
        return linears[-1][1] if linears else self.width()

    def heads(self) -> int:
        """Number of (query) heads of self-attention."""
        attention = self.modules[self.attention()]
        for holder in (attention, getattr(attention, "config", None), self.config):
            for name in ("num_heads", "num_attention_heads", "n_heads", "n_head"):
                if isinstance(count := getattr(holder, name, None), int) and count > 0:
                    return count
        raise MissingError("the number of its attention heads is not known")

    def head_columns(self, heads: Sequence[int]) -> Columns:
        """The channels of the output projection's input that hold these heads' results."""
        size = self.features(self.output_projection())[0] // self.heads()
        return as_columns([c for head in heads for c in range(head * size, (head + 1) * size)])

    def projection(self, role: Literal["q", "k", "v"]) -> tuple[str, int, Columns | None]:
        """The projection whose output holds queries, keys or values, the number of channels, and which (None: all)."""
        roles = self.roles()
        if "qkv" in roles:
            columns = self._fused_columns(role, roles["qkv"])
            return roles["qkv"], len(columns), columns
        if role not in roles:
            word = {"q": "query", "k": "key", "v": "value"}[role]
            raise MissingError(f"its {self.attention()!r} has no {word} projection of its own")
        path, width = roles[role], self.features(roles[role])[1]
        total = self.features(self.output_projection())[0]
        if role == "q" and "kv" not in roles and width == 2 * total:
            # Gated attention (Qwen3-Next): the projection yields, head by head, the query and then its gate.
            size = total // self.heads()
            starts = range(0, width, 2 * size)
            return path, total, tuple(c for start in starts for c in range(start, start + size))
        return path, width, None

    def _fused_columns(self, role: str, path: str) -> Columns:
        attention = self.modules[self.attention()]
        name, owner = path.rpartition(".")[2], type(attention)
        order, repeats = _FUSED_BY_CLASS.get(owner.__name__) or _FUSED[name]
        if repeats == "kv_heads" and not owner.__module__.startswith("transformers."):
            # Other libraries use the same names for other orders (ChatGLM's query_key_value).
            raise MissingError(f"the order of queries, keys and values in {owner.__name__}.{name} is not known")
        total, queries = self.features(path)[1], self.features(self.output_projection())[0]
        keys = (total - queries) // 2
        if repeats == "kv_heads":
            repeats = keys * self.heads() // queries
        sizes = {"q": queries // repeats, "k": keys // repeats, "v": keys // repeats}
        first = sum(sizes[r] for r in order[: order.index(role)])
        starts = range(first, total, total // repeats)
        return as_columns([c for start in starts for c in range(start, start + sizes[role])])

    def feed_forward(self) -> tuple[str, str]:
        """What reads the feed-forward's input (its module, or the up projection alone), and what yields its output.

        The second is the down projection, or the whole module of a mixture of experts.
        """
        mixtures = [p for p, m in self.modules.items() if p and isinstance(getattr(m, "experts", None), nn.Module)]
        linears = self._linears_outside_attention(mixtures)
        width = self.width()
        downs = [p for p, (_, o) in linears.items() if o == width and any(_ends_with(p, name) for name in _DOWN)]
        if not downs and not mixtures:  # unusual names: what leads back to the residual stream from another width
            downs = [p for p, (i, o) in linears.items() if o == width and i != width]
        outputs = mixtures + downs
        if len(outputs) != 1:
            there = f"there are several ({', '.join(outputs)})" if outputs else "there is none"
            kind = UnclearError if outputs else MissingError
            raise kind(f"it should have one feed-forward output, but {there}: name one by a module path")
        if mixtures:
            return mixtures[0], mixtures[0]
        down, inner = downs[0], linears[downs[0]][0]
        ups = [p for p, (i, o) in linears.items() if p != down and i == width and o in (inner, 2 * inner)]
        reader = parent(down)
        while reader and not any(inside(up, reader) for up in ups):
            reader = parent(reader)
        if not reader and len(ups) == 1:
            reader = ups[0]  # no module of its own: the two projections lie in the block itself
        if not reader:
            raise MissingError("its feed-forward has no single input: name one by a module path")
        return reader, down

    def channels(self, path: str, side: Literal["input", "output"]) -> int:
        """Channels of the first tensor that the module at `path` reads or yields.

        Raises:
            MissingError: The module works on something else than one vector per token, or its width is not known.
        """
        module = self.modules[""].get_submodule(path)
        if not path and any(map(self.attentions, (False, True))):
            return self.width_at(side)
        if path and len(self.attentions()) > 1:  # a stage: the block of it, or what lies beside its blocks
            steps = path.split(".")
            for depth in range(1, len(steps) + 1):
                part = Block(self.modules[""].get_submodule(join(*steps[:depth])), self.config)
                if len(part.attentions()) <= 1:
                    return part.channels(join(*steps[depth:]), side)
        if re.search(r"(^|\.)experts(\.|$)", path):
            raise MissingError(f"in {path!r} the tokens are regrouped by expert")
        if (width := leaf_channels(module, side)) is not None:
            attention = self.attention_or_none()
            whole = {n for role in self.roles().values() for n in self.features(role)} if attention else set()
            if attention and parent(path) == attention and width not in whole:
                raise MissingError(f"{path!r} works on each head by itself")
            return width
        if path == self.attention_or_none():
            down = self.output_projection()
            return self.attention_width() if side == "input" else self.features(down)[int(inside(down, path))]
        if is_parameterless_activation(path, module):
            return self.features(self.feed_forward()[1])[0]
        if isinstance(getattr(module, "experts", None), nn.Module):
            return self.width()
        linears = [f for p, m in self.modules.items() if inside(p, path) and (f := linear_features(m))]
        if linears:
            return linears[0][0] if side == "input" else linears[-1][1]
        raise MissingError(f"the width of {path!r} ({type(module).__name__}) is not known")

    def _linears_outside_attention(self, without: list[str]) -> dict[str, tuple[int, int]]:
        without = list(without)
        for cross in (False, True):
            if (attention := self.attention_or_none(cross)) is not None:
                without.append(common_ancestor(attention, self.output_projection(cross)))
        return {
            path: features
            for path, module in self.modules.items()
            if (features := linear_features(module)) and not any(inside(path, w) for w in without)
        }


def _is_patching(module: nn.Module) -> bool:
    """Whether this mixes all channels of an image's neighbouring places, as a patch embedding does."""
    return isinstance(module, nn.Conv2d | nn.Conv3d) and module.groups == 1


def _ends_with(path: str, name: str) -> bool:
    return path == name or path.endswith("." + name)
