"""Adapters that pyreft saved, turned into adapters of this library."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from reftune.errors import ReftuneError
from reftune.pyreft.checkpoint import TIED_POSITIONS, UNTIED_POSITIONS, write_adapters
from reftune.pyreft.config import Representation
from reftune.pyreft.reading import read_pyreft


def import_pyreft(
    folder: str | Path, output: str | Path, model: str | None = None, positions: str | None = None
) -> tuple[list[Path], list[str]]:
    """Turn an adapter that pyreft saved into one of this library's.

    Args:
        folder: what pyreft's ``save`` wrote.
        output: the folder to write.
        model: the base model (a name that ``reftune.models.load`` takes, or a folder). Without it, the layout of
            Llama's and most other decoders, ``model.layers.N``, is taken.
        positions: which tokens to edit, which pyreft does not save.

    Returns:
        The adapter folders written, and in words what the checkpoint does not say and was assumed.

    Raises:
        ReftuneError: a folder, model or intervention that cannot be read.
    """
    edits = read_pyreft(Path(folder))
    where = _block_paths(model)
    written = write_adapters(Path(output), edits, where, positions, model)
    untied = len({(one.component, one.layer) for one in edits}) < len(edits)
    assumed = [
        "dropout: taken as 0",
        "activation: taken as linear (set act_fn in adapter_config.json if there was one)",
    ]
    if positions is None:
        assumed.insert(0, f"positions: taken as {UNTIED_POSITIONS if untied else TIED_POSITIONS} (give --positions)")
    if model is None:
        assumed.append("base model: taken to have its blocks at model.layers.N (give --model)")
    return written, assumed


def _block_paths(model: str | None) -> Callable[[Representation], str]:
    if model is None:
        return _usual_path
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    from reftune.models import BUNDLED, bundled_folder

    try:
        place = str(bundled_folder()) if model == BUNDLED else model
        config = AutoConfig.from_pretrained(place, trust_remote_code=False)
        with init_empty_weights():
            empty = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # hub, json and configuration errors share no base class
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ReftuneError(f"model {model!r} cannot be read ({reason}): name a model folder or Hub name.") from None
    return lambda one: _checked_path(one, empty, model)


def _checked_path(one: Representation, empty: Any, model: str) -> str:
    site, width = one.site(empty), getattr(one.intervention, "width", None)
    if site.width != width:
        raise ReftuneError(f"The adapter edits states of width {width}, and {model!r} has {site.width}: name its base.")
    return site.block_path


def _usual_path(one: Representation) -> str:
    path, number, _ = one.component.partition("{layer}")
    return f"{path}{one.layer}" if number else f"model.layers.{one.layer}"
