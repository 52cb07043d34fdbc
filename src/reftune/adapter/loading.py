"""PEFT's own ways of loading and saving: a folder that does not fit changes nothing, and no tensor is left out."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextvars import ContextVar
from functools import wraps
from typing import Any

from peft import PeftConfig, PeftModel
from torch import nn

from reftune import models
from reftune.adapter.tensors import unchanged_on_error, under
from reftune.adapter.tuner import REFT, ReftModel
from reftune.edits.base import Edit
from reftune.engine.sites import find_sites
from reftune.engine.transformers_names import peft_may_read_earlier_names
from reftune.errors import ReftuneError

_CONFIG_GIVEN: ContextVar[bool] = ContextVar("config_given", default=False)
"""Whether ``from_pretrained`` is loading with a configuration that was given to it in place of the folder's."""


def load_what_fits(load: Callable[..., Any]) -> Callable[..., Any]:
    """``PeftModel.load_adapter`` that refuses another adapter's folder for the name of a ReFT adapter.

    PEFT copies the weights alone into an adapter that exists, which would keep its own layers and positions.

    Args:
        load: PEFT's own method.
    """

    @wraps(load)
    def load_adapter(self: PeftModel, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self.base_model, ReftModel):
            return load(self, model_id, adapter_name, *args, **kwargs)
        with unchanged_on_error(self.base_model.model):
            present = self.peft_config.get(adapter_name)
            if present is not None and present.peft_type == REFT and not _CONFIG_GIVEN.get():
                hub, _ = self._split_kwargs(dict(kwargs))
                _check_same(self.base_model.model, present, PeftConfig.from_pretrained(model_id, **hub), adapter_name)
            return load(self, model_id, adapter_name, *args, **kwargs)

    return load_adapter


def load_or_leave(load: Callable[..., Any]) -> Callable[..., Any]:
    """``PeftModel.from_pretrained`` that leaves the base model with its earlier adapters where the folder is refused.

    Args:
        load: PEFT's own method.
    """

    @wraps(load)
    def from_pretrained(cls: type[PeftModel], model: nn.Module, *args: Any, **kwargs: Any) -> PeftModel:
        token = _CONFIG_GIVEN.set(kwargs.get("config") is not None)
        try:
            with unchanged_on_error(under(model)), peft_may_read_earlier_names():
                return load(cls, model, *args, **kwargs)
        finally:
            _CONFIG_GIVEN.reset(token)

    return from_pretrained


def save_whole(save: Callable[..., Any]) -> Callable[..., Any]:
    """``PeftModel.save_pretrained`` that refuses to write a ReFT adapter without one of its tensors.

    Args:
        save: PEFT's own method.
    """

    @wraps(save)
    def save_pretrained(self: PeftModel, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self.base_model, ReftModel) and kwargs.get("is_main_process", True):
            for name in kwargs.get("selected_adapters") or list(self.peft_config):
                _check_whole(self.base_model, name, kwargs.get("state_dict"))
        with warnings.catch_warnings():  # PEFT asks the Hub for the base's vocabulary; there a bundled one has no page
            bundled = f"({models.BUNDLED}|{models.BUNDLED_ENCODER})"
            warnings.filterwarnings("ignore", message=f"Could not find a config file in {bundled} ")
            return save(self, *args, **kwargs)

    return save_pretrained


def _check_whole(model: nn.Module, adapter_name: str, state: dict[str, Any] | None) -> None:
    """Refuse a state without an edit's tensor; without a state, a model that holds pieces of DeepSpeed's."""
    for path, edit in model.named_modules():
        if not isinstance(edit, Edit) or not path.endswith(f".{adapter_name}"):
            continue
        for name, tensor in edit.named_parameters():
            key = f"{path}.{name}".replace("_fsdp_wrapped_module.", "").removeprefix("model.")
            if name in ("basis", "reflectors"):  # they stand for the rotation, which is saved
                continue
            there = not hasattr(tensor, "ds_id") if state is None else any(k.endswith(key) for k in state)
            if not there:
                raise ReftuneError(
                    f"The adapter {adapter_name!r} cannot be saved: {key} is not here as a whole. Save through the "
                    "trainer (save_model), or pass state_dict=accelerator.get_state_dict(model); under DeepSpeed's "
                    "ZeRO 3 set stage3_gather_16bit_weights_on_model_save."
                )


def _check_same(model: nn.Module, present: Any, given: Any, adapter_name: str) -> None:
    def places(config: Any) -> set[tuple[str, str]]:
        return {(s.module_path, s.side) for s in find_sites(model, config.component, config.layers_to_transform)}

    names = ("peft_type", "method", "r", "component", "positions", "share_weights", "act_fn", "parametrization")
    differing = [name for name in names if getattr(given, name, None) != getattr(present, name)]
    layers = "layers_to_transform"
    if not differing and getattr(given, layers) != getattr(present, layers) and places(given) != places(present):
        differing = [layers]
    if not differing and not set(given.modules_to_save or ()) <= set(present.modules_to_save or ()):
        differing = ["modules_to_save"]
    for name in differing:
        raise ReftuneError(
            f"Adapter {adapter_name!r} has {name}={getattr(present, name)!r} on this model, "
            f"{getattr(given, name, None)!r} in the folder: into a name that is taken go weights alone. Load it under "
            f"another name, or call delete_adapter({adapter_name!r}) first."
        )
