"""Adapter folders: what their two files must hold, checked for all that read one, with errors that say what is wrong.

PEFT and torch are imported by what needs them: `reftune info` reads a folder without.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
from safetensors import SafetensorError, deserialize

from reftune.engine.position_grammar import parse_positions
from reftune.errors import ReftuneError
from reftune.output.json_files import read_json_object
from reftune.output.targets import refuse_dangling
from reftune.output.terminal import shortened

if TYPE_CHECKING:
    from reftune.engine.positions import Part

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
EDIT_KEY = re.compile(
    r"^(?:base_model\.model\.)?(?P<block>.*?)\.?intervention\.(?P<kind>reft_edits|reft_suffix_edits)\.(?P<tensor>\w+)$"
)
"""A tensor of an edit in a weights file: its block's path, which of an untied pair it belongs to, and its own name."""
WRAPPING = re.compile(r"\.(?:original_module|token_adapter|base_layer|modules_to_save)(?=\.)")
"""What PEFT puts into a module's path where an adapter trains the module, or some of its rows."""
LAYER = re.compile(r"\.(\d+)(?:\.|$)")
"""The numbers in a module's path; the last is the block's."""
TENSORS = {
    "loreft": ("rotation", "weight", "bias"), "noreft": ("projection", "weight", "bias"),
    "consreft": ("rotation", "bias"), "lobireft": ("rotation", "bias"), "direft": ("projection", "weight", "bias"),
    "nodireft": ("projection", "weight", "bias"), "direft_orthogonal": ("rotation", "weight", "bias"),
    "gated": ("rotation", "weight", "bias", "probe", "threshold"),
}  # fmt: skip
"""What a checkpoint holds of each edit; a tensor that is not in `_SHAPES` is r x width."""
_SHAPES = {"bias": "r", "offset": "r", "probe": "width", "threshold": "one"}
_DECIDING = ("method", "r", "layers_to_transform", "component", "positions", "share_weights", "act_fn")
"""Fields without which an adapter is another function; every version has saved them."""
_KINDS: dict[str, tuple[type, ...]] = {
    "method": (str,), "r": (int,), "layers_to_transform": (int, list, str), "component": (str,), "positions": (str,),
    "share_weights": (bool,), "dropout": (float, int), "act_fn": (str, NoneType), "init": (str,),
    "parametrization": (str,), "add_bias": (bool,), "modules_to_save": (list, tuple, set, NoneType),
    "trainable_token_indices": (list, dict, NoneType), "ensure_weight_tying": (bool,),
    "peft_type": (str,), "task_type": (str, NoneType), "base_model_name_or_path": (str, NoneType),
    "revision": (str, NoneType), "inference_mode": (bool,), "auto_mapping": (dict, NoneType),
    "peft_version": (str, NoneType), "runtime_config": (dict, NoneType),
}  # fmt: skip
_MOST_LAYERS = 10_000
_CHOICES = {"init": ("identity", "paper"), "parametrization": ("cholesky", "householder")}
_EXPONENTS: dict[str, tuple[Any, Any]] = {
    "F64": (np.uint64, np.uint64(0x7FF0000000000000)), "F32": (np.uint32, np.uint32(0x7F800000)),
    "F16": (np.uint16, np.uint16(0x7C00)), "BF16": (np.uint16, np.uint16(0x7F80)),
}  # fmt: skip
"""How the bits of a float are read, and those that are all set where it is not finite."""
_FLOATS = (*_EXPONENTS, "torch.float64", "torch.float32", "torch.float16", "torch.bfloat16")
_HEADS = ("lm_head", "wte", "shared", "output_layer")
"""Modules that read or write token ids, beside those that are called embeddings."""


def read_adapter_config(folder: str | Path) -> dict[str, Any]:
    """The configuration of an adapter folder.

    Raises:
        ReftuneError: no such folder, no adapter in it, or a configuration that is not JSON or not ReFT's.
    """
    folder = Path(folder)
    path = folder / CONFIG_FILE
    if not path.is_file():
        refuse_dangling(path)
        what = "is not a folder" if not folder.is_dir() else f"has no {CONFIG_FILE}"
        raise ReftuneError(f"{folder}: {what}; give the --output folder of `reftune train`, or a saved adapter.")
    config = read_json_object(path, "the adapter must be saved again")
    if config.get("peft_type") != "REFT":
        raise ReftuneError(f"{path}: peft_type is {config.get('peft_type')!r}, not 'REFT'; load it with PEFT itself.")
    check_config(f"{path}: ", config)
    return config


def check_config(where: str, config: Mapping[str, Any]) -> None:
    """Refuse a saved configuration that does not say which function its adapter is.

    A field that nobody here knows is let through where it asks for nothing (null or empty), as what a newer PEFT adds
    does by default; else it may decide what the adapter does.

    Args:
        where: what errors begin with.
        config: as `adapter_config.json` holds it.

    Raises:
        ReftuneError: a field that is unknown, missing or without sense.
    """
    for name, value in config.items():
        if name not in _KINDS and value not in (None, [], {}) and not _is_field_of_peft(name):
            close = difflib.get_close_matches(name, _KINDS, 1)
            meant = f" (did you mean {close[0]!r}?)" if close else ""
            raise ReftuneError(
                f"{where}{name}={value!r}: there is no such field{meant}; correct it, or upgrade reftune and peft "
                "where a newer version has saved this adapter."
            )
    for name in _DECIDING:
        if name not in config:
            raise ReftuneError(f"{where}{name} is missing, without which the adapter is another; save it again.")
    check_fields(where, config)


def check_fields(where: str, config: Mapping[str, Any]) -> None:
    """Refuse values that are none for their fields; arguments and errors as for `check_config`."""

    def refuse(name: str, why: str) -> None:
        raise ReftuneError(f"{where}{name}={shortened(repr(config[name]))}: {why}.")

    for name, value in config.items():
        kinds = _KINDS.get(name, (object,))
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds and object not in kinds):
            words = (kind.__name__.replace("NoneType", "null").replace("str", "text") for kind in kinds)
            refuse(name, f"is no value for this field, which takes {' or '.join(words)}")
        if name in _CHOICES and value not in _CHOICES[name]:
            refuse(name, f"must be one of {', '.join(_CHOICES[name])}")
    layers, beside = config.get("layers_to_transform", "all"), config.get("modules_to_save") or ()
    listed = layers if isinstance(layers, (list, tuple)) else [layers]
    if layers != "all" and (not listed or not all(type(number) is int for number in listed)):
        refuse("layers_to_transform", "give a layer number, a list of them, or 'all'")
    if len(listed) > _MOST_LAYERS:
        refuse("layers_to_transform", f"names more than {_MOST_LAYERS:,} layers, which no model has")
    if len(set(listed)) < len(listed):
        refuse("layers_to_transform", "a layer is named twice")
    if not config.get("component", "block_output"):
        refuse("component", "name a place, such as block_output")
    if config.get("add_bias") and config.get("method") in TENSORS and config["method"] != "noreft":
        refuse("add_bias", "is for noreft alone")
    if config.get("r", 1) < 1:
        refuse("r", "the rank is a whole number of at least 1")
    if not 0.0 <= config.get("dropout", 0.0) < 1.0:
        refuse("dropout", "must be at least 0 and below 1")
    if not all(isinstance(name, str) for name in beside):
        refuse("modules_to_save", "give names of modules")
    try:
        parse_positions(config.get("positions", "l1"))
        if config.get("act_fn") is not None:
            from reftune.edits.activations import activation

            activation(config["act_fn"])
    except ReftuneError as error:
        raise ReftuneError(f"{where}{error}") from None


def _is_field_of_peft(name: str) -> bool:
    """Whether the PEFT that is installed has a field that is not in our table."""
    from peft import PeftConfig

    return name in PeftConfig.__dataclass_fields__


def trained_beside_edits(config: Mapping[str, Any]) -> str | None:
    """What an adapter trained besides its edits, as ``field=value``; None where that is nothing."""
    fields = ("modules_to_save", "trainable_token_indices")
    return next((f"{name}={config[name]!r}" for name in fields if config.get(name)), None)


def read_weights(folder: str | Path, config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The tensors of an adapter, checked, as safetensors' `deserialize` gives them: `dtype`, `shape` and `data`.

    Args:
        folder: an adapter folder.
        config: its configuration, checked.

    Raises:
        ReftuneError: the file is missing or damaged, or its tensors are not those of such an adapter, not of floats or
            not finite.
    """
    path = Path(folder) / WEIGHTS_FILE
    if not path.is_file():
        raise ReftuneError(f"{path} does not exist; the adapter was not saved to its end. Use an earlier checkpoint.")
    try:
        tensors = dict(deserialize(weights_bytes(path)))
    except (SafetensorError, OSError) as error:
        raise ReftuneError(
            f"{path} is not an intact safetensors file ({error}): it was cut off or overwritten. Use an earlier "
            "checkpoint."
        ) from None
    check_edits(path, config, {name: (tensor["shape"], tensor["dtype"]) for name, tensor in tensors.items()})
    for name, tensor in tensors.items():
        if tensor["dtype"] in _EXPONENTS:
            kind, exponent = _EXPONENTS[tensor["dtype"]]
            bits = np.frombuffer(tensor["data"], kind)
            if bool(((bits & exponent) == exponent).any()):
                raise not_finite(path, name)
    return tensors


def weights_bytes(path: Path) -> bytes:
    """What a weights file holds.

    Raises:
        ReftuneError: more than this machine has memory for, as a file full of holes can say.
    """
    size, free = path.stat().st_size, psutil.virtual_memory().available
    if size > free:
        raise ReftuneError(
            f"{path} is of {size:,} bytes, and {free:,} bytes of memory are free: this is no adapter, or needs another "
            "machine."
        )
    return path.read_bytes()


def refuse_other_files(folder: Path) -> None:
    """Refuse a pickle in place of the weights, and weights that are no file: PEFT would read them, or wait for ever.

    Raises:
        ReftuneError: naming the file.
    """
    path, pickled = folder / WEIGHTS_FILE, folder / "adapter_model.bin"
    if os.path.lexists(path) and not path.is_file():
        raise ReftuneError(f"{path} is not a file; save the adapter again.")
    if pickled.exists() and not path.is_file():
        raise ReftuneError(
            f"{pickled} is a pickle, which is not read; save the adapter as safetensors (safe_serialization=True)."
        )


def tensor_values(tensor: Mapping[str, Any]) -> np.ndarray:
    """A tensor of a safetensors file in float64; numpy has no bfloat16, which is the upper half of a float32."""
    data, kind = tensor["data"], tensor["dtype"]
    if kind == "BF16":
        values = (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)
    else:
        values = np.frombuffer(data, {"F64": np.float64, "F32": np.float32, "F16": np.float16}[kind])
    return values.astype(np.float64).reshape(tensor["shape"])


def not_finite(path: Path | None, name: str) -> ReftuneError:
    """The error for a tensor with NaN or infinite values."""
    where = f"{path}: " if path is not None else ""
    return ReftuneError(f"{where}{name} holds values that are not finite: its training diverged. Train it again.")


def edit_tensors(
    path: Path, config: Mapping[str, Any], names: Collection[str]
) -> dict[tuple[str, Part], dict[str, str]]:
    """The tensors of a weights file by the edit that they belong to (its block, and its part), and by their own names.

    Args:
        path: the file, for errors.
        config: the adapter's configuration, checked.
        names: every name in the file.

    Raises:
        ReftuneError: a name that is foreign or there twice, or edits that are not those of the configuration.
    """
    untied = not config["share_weights"] and parse_positions(config["positions"]).has_two_ends
    edits: dict[tuple[str, Part], dict[str, str]] = {}
    for name in names:
        match = EDIT_KEY.match(name)
        if match is None and _lies_beside(config, name.removeprefix("base_model.model.")):
            continue
        suffix = match is not None and match["kind"] == "reft_suffix_edits"
        if match is None or (suffix and not untied):
            raise ReftuneError(f"{path}: {name} is no tensor of this adapter; save the adapter again.")
        part: Part = "suffix" if suffix else "prefix" if untied else "both"
        held = edits.setdefault((match["block"], part), {})
        if match["tensor"] in held:
            raise ReftuneError(f"{path}: {name} and {held[match['tensor']]} are one tensor; save the adapter again.")
        held[match["tensor"]] = name
    beside = trained_beside_edits(config)
    if beside and all(EDIT_KEY.match(name) for name in names):
        raise ReftuneError(f"{path} holds nothing of {beside}: the adapter was not saved whole.")
    layers = config["layers_to_transform"]
    blocks = list(dict.fromkeys(block for block, _ in edits))
    wanted = len(blocks) if layers == "all" else len(layers) if isinstance(layers, list) else 1
    if not blocks or len(blocks) != wanted or len(edits) != wanted * (2 if untied else 1):
        raise ReftuneError(
            f"{path} holds {len(edits)} edits at {len(blocks)} places; layers_to_transform={layers!r} with "
            f"share_weights={not untied} asks for others: the adapter was not saved whole."
        )
    listed = [] if layers == "all" else layers if isinstance(layers, list) else [layers]
    found = {int(numbers[-1]) for block in blocks if (numbers := LAYER.findall(f".{block}"))}
    if found and any(layer >= 0 and layer not in found for layer in listed):
        raise ReftuneError(
            f"{path} holds edits of the layers {sorted(found)}; layers_to_transform={layers!r} asks for others: its "
            f"{CONFIG_FILE} is not of this file."
        )
    return edits


def check_edits(path: Path, config: Mapping[str, Any], found: Mapping[str, tuple[Sequence[int], str]]) -> None:
    """Refuse tensors that are not those of such an adapter; a user's own method decides about its shapes itself.

    Args:
        path: the weights file, for errors.
        config: the adapter's configuration, checked.
        found: shapes and dtypes by name in the file.

    Raises:
        ReftuneError: as ``edit_tensors`` and ``check_edit``.
    """
    for (block, _), names in edit_tensors(path, config, found).items():
        held = {own: found[name] for own, name in names.items()}
        if (expected := _expected(config, held)) is not None:
            check_edit(path, block, config, expected, held)


def check_edit(
    path: Path,
    block: str,
    config: Mapping[str, Any],
    expected: Mapping[str, Sequence[int]],
    found: Mapping[str, tuple[Sequence[int], str]],
) -> None:
    """Refuse an edit whose tensors are not those of its method and rank.

    Args:
        path: the weights file, for errors.
        block: where the edit sits.
        config: the adapter's configuration.
        expected: shapes by name.
        found: shapes and dtypes by name.

    Raises:
        ReftuneError: a tensor that is missing, too many, of another shape or not of floating-point numbers.
    """
    for name in sorted(expected.keys() | found.keys()):
        shape, dtype = found.get(name, ((), ""))
        if name in expected and tuple(shape) == tuple(expected[name]) and dtype in _FLOATS:
            continue
        what = f"shape {tuple(shape)} ({dtype})" if dtype else "nothing"
        need = f"floats of shape {tuple(expected[name])}" if name in expected else "nothing of that name"
        raise ReftuneError(
            f"{path}: the edit at {block or 'the model'} holds {what} for {name}; method={config['method']!r} with "
            f"r={config['r']} has {need}."
        )


def _expected(config: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, tuple[int, ...]] | None:
    """The shapes of an edit of ours by name, for the width that its matrices have; None for a user's own edit."""
    names = TENSORS.get(config["method"])
    if names is None:
        return None
    width = max((shape[-1] for shape, _ in found.values() if shape), default=0)
    names = (*names, "offset") if config.get("add_bias") and config["method"] == "noreft" else names
    sizes = {"r": config["r"], "width": width, "one": 1}
    return {name: (sizes[_SHAPES[name]],) if name in _SHAPES else (config["r"], width) for name in names}


def _lies_beside(config: Mapping[str, Any], name: str) -> bool:
    """Whether a tensor that is no edit's may be in the file: of a module trained whole, or of a resized embedding."""
    if config.get("trainable_token_indices") and "trainable_tokens" in name:
        return True
    module = WRAPPING.sub("", name).rpartition(".")[0].rpartition(".")[2]
    embeds = "emb" in module or module in _HEADS
    return embeds or any(f"{saved}." in name for saved in config.get("modules_to_save") or ())
