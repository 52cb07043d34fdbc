"""Adapter folders of this library, written from and read into the facade."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from reftune.adapter.checkpoint import CONFIG_FILE, WEIGHTS_FILE, read_adapter_config, read_weights
from reftune.adapter.config import ReftConfig as AdapterConfig
from reftune.engine.sites import find_sites
from reftune.errors import ReftuneError
from reftune.pyreft.config import ReftConfig, Representation
from reftune.pyreft.interventions import BY_METHOD, INTERVENTIONS
from reftune.pyreft.reading import fill, read_pyreft

TIED_POSITIONS, UNTIED_POSITIONS = "l1", "f1+l1"
_OPTIONS = ("dropout", "act_fn", "init", "parametrization")


@dataclass(frozen=True)
class _Group:
    """Edits that one adapter can hold: alike in all but their layer."""

    method: str
    r: int
    component: str
    untied: bool
    options: tuple[tuple[str, Any], ...]


def save_model(model: Any, folder: Path, positions: str | None) -> None:
    """Write a facade model's edits (and what else of the model trained, a classifier's head above all)."""
    config: ReftConfig = model.reft_config
    base = model.get_base_model()
    head = {} if model.model is not base else {name: p.detach() for name, p in model._trained_of_model().items()}
    name = getattr(base, "name_or_path", None) or None
    write_adapters(
        folder, config.representations, lambda r: r.site(base).block_path, positions or config.positions, name, head
    )


def write_adapters(
    folder: Path,
    representations: Sequence[Representation],
    block_path: Callable[[Representation], str],
    positions: str | None = None,
    base_model: str | None = None,
    head: Mapping[str, Tensor] | None = None,
) -> list[Path]:
    """Write edits as adapters: into one folder where they are alike, else one inside it for each kind.

    Args:
        folder: where to.
        representations: the edits; a place named twice holds an untied pair, prefix first.
        block_path: the path of the block that a representation belongs to.
        positions: of every adapter; by default ``l1``, or ``f1+l1`` for untied pairs.
        base_model: name of the base model, if it is known.
        head: further trained parameters of the model by name.

    Returns:
        The adapter folders.

    Raises:
        ReftuneError: a place named more than twice, or an intervention that this library cannot name.
    """
    places: dict[tuple[str, int | None], list[nn.Module]] = {}
    first: dict[tuple[str, int | None], Representation] = {}
    for one in representations:
        assert one.intervention is not None
        places.setdefault((one.component, one.layer), []).append(one.intervention)
        first.setdefault((one.component, one.layer), one)
    groups: dict[_Group, list[tuple[str, int | None]]] = {}
    for place, edits in places.items():
        if len(edits) > 2:
            raise ReftuneError(
                f"{place[0]} of layer {place[1]} has {len(edits)} interventions; an adapter holds a pair at most."
            )
        kinds = {_kind(edit, place[0], len(edits) == 2) for edit in edits}
        if len(kinds) > 1:
            raise ReftuneError(
                f"{place[0]} of layer {place[1]}: the two interventions of a pair must be of one kind and rank."
            )
        groups.setdefault(kinds.pop(), []).append(place)
    written = []
    for number, (group, members) in enumerate(groups.items()):
        target = folder if len(groups) == 1 else folder / f"edit{number}"
        tensors: dict[str, Tensor] = {}
        for place in members:
            path = block_path(first[place])
            for container, edit in zip(("reft_edits", "reft_suffix_edits"), places[place], strict=False):
                for name, value in edit.state_dict().items():
                    tensors[f"base_model.model.{path}.intervention.{container}.{name}"] = (
                        value.detach().cpu().contiguous()
                    )
        modules = sorted({name.rpartition(".")[0] for name in head or {}})
        for name, value in (head or {}).items():
            tensors[f"base_model.model.{name}"] = value.cpu().contiguous()
        layers = [layer for _, layer in members if layer is not None]
        config = AdapterConfig(
            method=group.method,
            r=group.r,
            layers_to_transform=layers or "all",
            component=group.component,
            positions=positions or (UNTIED_POSITIONS if group.untied else TIED_POSITIONS),
            share_weights=not group.untied,
            modules_to_save=modules or None,
            base_model_name_or_path=base_model,
            **dict(group.options),
        )
        config.inference_mode = True
        target.mkdir(parents=True, exist_ok=True)
        config.save_pretrained(str(target))
        save_file(tensors, target / WEIGHTS_FILE, metadata={"format": "pt"})
        written.append(target)
    return written


def _kind(edit: Any, component: str, untied: bool) -> _Group:
    method = getattr(edit, "method", None)
    if method not in BY_METHOD:
        raise ReftuneError(
            f"{type(edit).__name__} is not one of {', '.join(INTERVENTIONS)}; register it and use reftune.ReftConfig."
        )
    kept = BY_METHOD[method]
    if type(edit).forward is not kept.forward:
        raise ReftuneError(
            f"{type(edit).__name__} computes by a forward of its own, which an adapter folder does not hold: it would "
            f"come back as {kept.__name__}. Register it as an edit (reftune.edits.register_edit) and use "
            "reftune.ReftConfig, or save its state_dict() yourself."
        )
    options = {name: getattr(edit, name) for name in _OPTIONS if hasattr(edit, name)}
    options["add_bias"] = getattr(edit, "offset", None) is not None
    return _Group(method, edit.r, component, untied, tuple(sorted(options.items())))


def load_config(folder: Path, model: nn.Module) -> ReftConfig:
    """The configuration of a saved adapter with its tensors in the interventions, for this model.

    Args:
        folder: a folder that this library or pyreft wrote.
        model: the base model; **its classifier head, if the folder has one, is loaded**.

    Raises:
        ReftuneError: no adapter there, or one that does not fit.
    """
    inner = sorted(path.parent for path in folder.glob(f"*/{CONFIG_FILE}"))
    if not (folder / CONFIG_FILE).is_file() and not inner:
        return ReftConfig.of(read_pyreft(folder))
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # pyright: ignore
    found: list[Representation] = []
    positions = None
    for one in [folder] if (folder / CONFIG_FILE).is_file() else inner:
        raw = read_adapter_config(one)
        read_weights(one, raw)
        config: Any = AdapterConfig.from_pretrained(str(one))
        positions = raw.get("positions", positions)
        tensors = {name.removeprefix("base_model.model."): t for name, t in load_file(one / WEIGHTS_FILE).items()}
        for container in ("reft_edits", "reft_suffix_edits"):
            for site in find_sites(base, config.component, config.layers_to_transform):
                start = f"{site.block_path}.intervention.{container}."
                own = {n.removeprefix(start): tensors.pop(n) for n in list(tensors) if n.startswith(start)}
                if not own and container == "reft_suffix_edits":
                    continue
                layer = None if "{layer}" not in config.component and ":" in config.component else site.layer
                edit = BY_METHOD[config.method](embed_dim=site.width, low_rank_dimension=config.r, **config.options)
                fill(edit, own, f"{one / WEIGHTS_FILE}, layer {site.layer}")
                found.append(Representation(config.component, layer, edit))
        for name, value in tensors.items():
            parameter = base.get_parameter(name)
            parameter.data.copy_(value)
    return ReftConfig.of(found, positions)
