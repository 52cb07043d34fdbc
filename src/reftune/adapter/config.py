"""``ReftConfig``: a ReFT adapter as PEFT knows it, and the registration that makes PEFT know it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, no_type_check

import torch
from peft import PeftModel, get_peft_model
from peft.config import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType, register_peft_method
from torch import nn

from reftune.adapter.checkpoint import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    check_config,
    check_fields,
    read_adapter_config,
    read_weights,
    refuse_other_files,
)
from reftune.adapter.loading import load_or_leave, load_what_fits, save_whole
from reftune.adapter.tuner import REFT, ReftModel
from reftune.edits import Edit, edit_class, make_edit, method_name
from reftune.edits.base import Init
from reftune.edits.rotated import Parametrization
from reftune.engine.hooks import EditSpec
from reftune.engine.position_grammar import parse_positions
from reftune.engine.transformers_names import peft_may_read_earlier_names
from reftune.errors import ReftuneError

if REFT not in PeftType.__members__:
    import aenum

    aenum.extend_enum(PeftType, REFT, REFT)

_EDIT_OPTIONS = ("dropout", "act_fn", "init", "parametrization", "add_bias")


@no_type_check  # it checks itself, with messages that say the way out
@dataclass
class ReftConfig(PeftConfig):
    """Configuration of a ReFT adapter (arXiv 2404.03592): sites x positions x edit.

    The defaults are the paper's method at the least cost. The best setting known, which `reftune train` takes, is
    ``method="direft", r=1, layers_to_transform="all", positions="l1+generated"``, with the learning rate of
    `reftune.runs.known_settings.learning_rate` (docs/choosing.md).

    Raises:
        ReftuneError: a field out of its range; the message names it and the way out. Fields that depend on the base
            model (layers, component, rank against width) are checked when the adapter meets it.
    """

    weights_file: ClassVar[Path | None] = None
    """Where the weights lie of a configuration that was read: what errors of loading name."""

    method: str | type[nn.Module] = field(
        default="loreft",
        metadata={
            "help": "The edit: loreft (h + R^T(Wh + b - Rh)), direft (h + W2^T(W1h + b)), noreft, consreft, lobireft, "
            "direft_orthogonal, nodireft, gated, or a registered class."
        },
    )
    r: int = field(default=4, metadata={"help": "Rank: dimensions of the edited subspace."})
    layers_to_transform: int | Sequence[int] | Literal["all"] = field(
        default="all", metadata={"help": "Layers to edit, from 0: one, a list, or 'all'; negatives count from the end."}
    )
    component: str = field(
        default="block_output",
        metadata={
            "help": "Where in the layer: block_output, block_input, mlp_output, mlp_input, attention_output, "
            "attention_input, query_output, key_output, value_output, head_output[0,3], or a module path with {layer}."
        },
    )
    positions: str = field(
        default="l1",
        metadata={
            "help": "Which tokens: fN first N of the prompt, lN last N, fA+lB both, prompt all of it, all every token; "
            "+generated adds those after the prompt, as in l1+generated."
        },
    )
    share_weights: bool = field(
        default=True, metadata={"help": "One edit for prefix and suffix (tied); false gives each its own."}
    )
    dropout: float = field(
        default=0.0,
        metadata={"help": "Probability of dropping an element of the edit in training (never of the state)."},
    )
    act_fn: str | None = field(
        default=None, metadata={"help": "Activation inside the edit, by its transformers name; none is linear."}
    )
    init: Init = field(
        default="identity", metadata={"help": "identity starts as the base model; paper as the paper's code does."}
    )
    parametrization: Parametrization = field(
        default="cholesky",
        metadata={"help": "How a rotation is kept orthonormal; householder follows pyreft's training curve."},
    )
    add_bias: bool = field(default=False, metadata={"help": "noreft only: a bias in its projection, as in pyreft."})
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Further modules to train and save whole, such as a classifier head."}
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None,
        metadata={
            "help": "Token ids whose embeddings are trained and saved: of the input embedding, or by module name."
        },
    )
    ensure_weight_tying: bool = field(
        default=False, metadata={"help": "Modules that share the embedding's weights share what is trained of it too."}
    )

    def __new__(cls, *args: Any, **given: Any) -> ReftConfig:
        """PEFT makes one of what a file holds, drops the fields it does not know, and takes defaults for the others."""
        if "peft_type" in given:
            check_config("", given)
        return super().__new__(cls)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> ReftConfig:
        """The configuration of an adapter folder or Hub repository (see ``PeftConfig.from_pretrained``).

        Raises:
            ReftuneError: naming the file and the field that is unknown, missing or without sense.
        """
        place = Path(pretrained_model_name_or_path, subfolder or "")
        try:
            config: Any = super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)
        except ReftuneError as error:
            raise ReftuneError(f"{place / CONFIG_FILE}: {error}") from None
        if place.is_dir():
            refuse_other_files(place)
        config.weights_file = place / WEIGHTS_FILE
        return config

    def __post_init__(self) -> None:
        try:
            super().__post_init__()
        except ValueError as error:
            raise ReftuneError(str(error)) from None
        self.peft_type = PeftType[REFT]
        if isinstance(self.method, type):
            self.method = method_name(self.method)
        self.layers_to_transform = _layers(self.layers_to_transform)
        check_fields("", vars(self))
        self.positions = parse_positions(self.positions).text
        if issubclass(edit_class(self.method), Edit):
            with torch.random.fork_rng(devices=[]):  # a wrong option fails here, where it was written
                make_edit(self.method, min(self.r, 8), min(self.r, 8), **self.options)

    @property
    def options(self) -> dict[str, Any]:
        """The edit's own options."""
        return {name: getattr(self, name) for name in _EDIT_OPTIONS}

    def spec(self) -> EditSpec:
        """The adapter as the engine takes it."""
        return EditSpec(
            method=self.method,
            r=self.r,
            layers_to_transform=self.layers_to_transform,
            component=self.component,
            positions=self.positions,
            share_weights=self.share_weights,
            options=self.options,
        )


if PeftType[REFT] not in PEFT_TYPE_TO_CONFIG_MAPPING:
    register_peft_method(name="reft", config_cls=ReftConfig, model_cls=ReftModel, prefix=ReftModel.prefix)
    PeftModel.save_pretrained = save_whole(PeftModel.save_pretrained)
    PeftModel.load_adapter = load_what_fits(PeftModel.load_adapter)
    PeftModel.from_pretrained = classmethod(load_or_leave(PeftModel.from_pretrained.__func__))  # type: ignore[method-assign]


def _layers(layers: Any) -> Any:
    """Layers as a list, where they are a set, a range or the like."""
    return sorted(layers) if isinstance(layers, set) else list(layers) if isinstance(layers, (tuple, range)) else layers


def new_adapter(model: nn.Module, config: PeftConfig, **options: Any) -> PeftModel:
    """``get_peft_model``, for calls of our own; **changes the model**.

    Args:
        model: the base model.
        config: of the adapter.
        **options: PEFT's own.

    Raises:
        ReftuneError: a layer, component or rank that the model does not have.
    """
    with peft_may_read_earlier_names():
        found = get_peft_model(model, config, **options)  # type: ignore[arg-type]
    if not isinstance(found, PeftModel):
        raise TypeError(f"get_peft_model returned a {type(found).__name__}")
    return found


def load_adapter(model: nn.Module, folder: str | Path, is_trainable: bool = False) -> PeftModel:
    """Load a saved adapter onto its base model, with clear errors for what can be wrong with the folder.

    Args:
        model: the base model; **it is changed** (edits are attached to it).
        folder: an adapter folder.
        is_trainable: whether training goes on.

    Raises:
        ReftuneError: a folder, file or base model that does not fit.
    """
    read_weights(folder, read_adapter_config(folder))
    try:
        return PeftModel.from_pretrained(model, str(folder), is_trainable=is_trainable)
    except KeyError as error:  # PEFT looks for what a module that is trained whole must have
        raise ReftuneError(f"{Path(folder) / WEIGHTS_FILE} holds no tensor {error}; save the adapter again.") from None
