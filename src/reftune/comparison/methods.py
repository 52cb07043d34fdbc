"""The methods that can be compared: their keys in a recipe, their configuration, and how each is put on a base model.

To add one: its keys in `_KEYS` and a branch in `peft_config` (or in `attach_method`, where it is no PEFT method).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import PreTrainedTokenizerBase

from reftune.edits import available_edits
from reftune.errors import ReftuneError
from reftune.runs.recipe import TrainRecipe, adapter_keys, recipe_fields
from reftune.runs.recipe_values import check_names, read_layers

WEIGHTS = ("lora", "dora")
OTHERS = ("ia3", "prefix", "prompt", "full", "base")

TRAINING_KEYS = (
    "lr", "warmup_ratio", "warmup_steps", "weight_decay", "optimizer", "schedule", "max_grad_norm",
    "gradient_checkpointing", "prefix_reuse",
)  # fmt: skip
"""Keys of training that a method may set for itself; the others decide data and budget, which all methods share."""

_TARGETS: Mapping[str, tuple[str, ...]] = {"target_modules": ("modules", "targets")}
_TOKENS: Mapping[str, tuple[str, ...]] = {"virtual_tokens": ("num_virtual_tokens", "tokens", "length")}
_LORA: Mapping[str, tuple[str, ...]] = {
    "rank": ("r",),
    "alpha": ("lora_alpha",),
    "dropout": ("lora_dropout",),
    "layers": ("layers_to_transform",),
    **_TARGETS,
}
_KEYS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "lora": _LORA,
    "dora": _LORA,
    "ia3": {**_TARGETS, "feedforward_modules": ()},
    "prefix": {**_TOKENS, "prefix_projection": ()},
    "prompt": {**_TOKENS, "init_text": ("prompt_tuning_init_text",)},
    "full": {},
    "base": {},
}
_DEFAULT_LR = {"lora": 1e-3, "dora": 1e-3, "ia3": 5e-3, "prefix": 1e-2, "prompt": 3e-2, "full": 5e-5}
"""Where neither the method nor the recipe gives one; edits have TrainRecipe's default."""


@dataclass(frozen=True)
class Method:
    """One entry under `methods`, checked.

    Attributes:
        name: as the recipe calls it.
        kind: `lora`, `dora`, `ia3`, `prefix`, `prompt`, `full`, `base`, an edit (`loreft`), or `lora+loreft`.
        train: the shared settings with this method's own; its adapter fields count for edits alone.
        options: what else it was given, by key (of LoRA's part where it is a pair).
    """

    name: str
    kind: str
    train: TrainRecipe
    options: Mapping[str, Any]

    @property
    def weights(self) -> str | None:
        """`lora` or `dora`, alone or under an edit."""
        return self.kind.partition("+")[0] if self.kind.partition("+")[0] in WEIGHTS else None

    @property
    def edits(self) -> bool:
        """Whether a ReFT edit is part of it."""
        return "+" in self.kind or self.kind not in (*WEIGHTS, *OTHERS)

    @property
    def trains(self) -> bool:
        """Whether anything is trained; the base model is only evaluated."""
        return self.kind != "base"

    def settings(self) -> dict[str, Any]:
        """What decides the result and is this method's own, for its fingerprint and the report."""
        own: dict[str, Any] = {"kind": self.kind, **self.options}
        if self.trains:
            own |= {name: getattr(self.train, name) for name in TRAINING_KEYS}
        if self.edits:
            own |= {name: getattr(self.train, name) for name in adapter_keys() if name != "method"}
        return own

    def summary(self) -> str:
        """The settings in a line, as a table shows them."""
        parts: list[str] = []
        if self.edits:
            parts += [self.train.positions, f"layers {_listed(self.train.layers)}", f"rank {self.train.rank}"]
        for name, value in self.options.items():
            if value is not None and value != 0.0:
                label = f"{self.weights} {name}" if "+" in self.kind else name
                parts.append(f"{label.replace('_', ' ')} {_listed(value)}")
        if self.trains:
            parts.append(f"lr {self.train.lr:g}")
        return ", ".join(parts)


def read_method(name: str, given: Any, shared: Mapping[str, Any], where: str) -> Method:
    """Check one entry under `methods`.

    Args:
        name: its name.
        given: its keys; a bare word means `{method: word}`.
        shared: the TrainRecipe keys at the top of the recipe.
        where: the file, for messages.

    Raises:
        ReftuneError: naming the method, the key, its value and the way out.
    """
    where = f"{where}: methods: {name}"
    values: dict[str, Any] = {"method": given} if isinstance(given, str) else dict(given or {})
    kind = _kind(values.pop("method", name), where)
    weights, plus, _ = kind.partition("+")
    edits = bool(plus) or kind not in (*WEIGHTS, *OTHERS)
    own: dict[str, tuple[str, ...]] = dict(_KEYS.get(kind, {}))
    if plus:  # plain keys are the edit's, LoRA's carry its name
        own = {f"lora_{key}": () for key in _LORA}
    trained = [key for key in TRAINING_KEYS if key != "prefix_reuse" or (edits and not plus)] if kind != "base" else []
    names = {item.name: item.metadata["aka"] for item in recipe_fields()}
    known = own | {key: names[key] for key in (*(adapter_keys()[1:] if edits else ()), *trained)}
    for key in values:
        if key in names and key not in (*known, *adapter_keys(), *TRAINING_KEYS):
            raise ReftuneError(f"{where}: {key!r} is shared by all methods; write it at the top of the recipe.")
    check_names(values, {"method": (), **known}, where)
    settings = {key: value for key, value in values.items() if key not in own}
    if "lr" not in values and "lr" not in shared and (weights in _DEFAULT_LR) and not plus:
        settings["lr"] = _DEFAULT_LR[weights]
    if plus or not edits:
        settings["prefix_reuse"] = "off"  # what these train lies under every token
    if edits:
        settings["method"] = kind.partition("+")[2] or kind
    try:
        train = TrainRecipe(**{**shared, **settings})
        options = _options(kind, {key.removeprefix("lora_") if plus else key: values.get(key) for key in own})
        method = Method(name, kind, train, options)
        if method.weights or not edits and kind not in ("full", "base"):
            peft_config(method)
    except ReftuneError as error:
        raise ReftuneError(f"{where}: {error}") from None
    except (ValueError, TypeError) as error:  # PEFT's own checks
        raise ReftuneError(f"{where}: {error}") from None
    return method


def _kind(value: Any, where: str) -> str:
    kind = str(value).strip().lower()
    weights, plus, edit = (part.strip() for part in kind.partition("+"))
    known = [*OTHERS, *WEIGHTS, *available_edits()]
    if plus:
        if weights not in WEIGHTS or edit not in available_edits():
            raise ReftuneError(
                f"{where}: method={value!r}: a pair is LoRA or DoRA and an edit, such as lora+loreft; the edits are "
                f"{', '.join(available_edits())}."
            )
        return f"{weights}+{edit}"
    if kind not in known:
        check_names([kind], dict.fromkeys(known, ()), where, "method")
    return kind


def _options(kind: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The method's own keys with their defaults, as the declared types."""
    options: dict[str, Any] = {}
    for key, value in given.items():
        if key == "rank":
            options[key] = _number(key, 8 if value is None else value, whole=True)
        elif key == "alpha":
            options[key] = 2.0 * options["rank"] if value is None else _number(key, value)
        elif key == "dropout":
            options[key] = _number(key, 0.0 if value is None else value, least=0.0)
        elif key == "virtual_tokens":
            options[key] = _number(key, 20 if value is None else value, whole=True)
        elif key == "prefix_projection":
            options[key] = _switch(key, value)
        elif key == "layers":
            layers = None if value is None or value == "all" else read_layers(value)
            options[key] = [layers] if isinstance(layers, int) else layers
        elif key == "init_text":
            options[key] = None if value is None else str(value)
        else:
            options[key] = _names(key, value)
    return options


def _number(key: str, value: Any, *, whole: bool = False, least: float = 1e-12) -> Any:
    try:
        number = float(value) if not isinstance(value, bool) else None
    except (TypeError, ValueError):
        number = None
    if number is None or number != number or number < least or (whole and not number.is_integer()):
        what = (
            "a whole number of at least 1" if whole else "a number of at least 0" if least == 0 else "a number above 0"
        )
        raise ReftuneError(f"{key}={value!r}: give {what}.")
    return int(number) if whole else number


def _switch(key: str, value: Any) -> bool:
    if value is not None and not isinstance(value, bool):
        raise ReftuneError(f"{key}={value!r}: write true or false.")
    return bool(value)


def _names(key: str, value: Any) -> list[str] | str | None:
    """Module names; PEFT has its own for the known architectures, and for `all-linear`."""
    if value is None or value == "all-linear":
        return value
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, (list, tuple)) or not parts or not all(isinstance(part, str) for part in parts):
        raise ReftuneError(f"{key}={value!r}: write module names, such as [q_proj, v_proj], or all-linear.")
    return [part.strip() for part in parts]


def _listed(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


# On a model


@dataclass(frozen=True)
class Adapted:
    """A base model with a method on it.

    Attributes:
        model: what the trainer trains; the base model itself for `full` and `base`.
        adapters: the adapters to save, by their names on the PEFT model that holds each.
    """

    model: Any
    adapters: Mapping[str, PeftModel]


def attach_method(method: Method, base: Any, tokenizer: PreTrainedTokenizerBase) -> Adapted:
    """Put a method on a base model, ready to train; **changes the model**.

    Raises:
        ReftuneError: a layer, module or rank that this model does not have.
    """
    try:
        if method.kind in ("full", "base"):
            for parameter in base.parameters():
                parameter.requires_grad_(method.kind == "full" and parameter.is_floating_point())
            return Adapted(base, {})
        if not method.edits:
            config = peft_config(method, tokenizer)
            return Adapted(*_both("default", get_peft_model(base, config)))
        if method.weights is None:
            return Adapted(*_both("default", get_peft_model(base, method.train.adapter_config())))
        below = get_peft_model(base, peft_config(method, tokenizer))
        # The second is made on what is under the first, under a name of its own.
        with warnings.catch_warnings():  # PEFT warns of a second one by accident; this is on purpose
            warnings.filterwarnings("ignore", message="You are trying to modify a model with PEFT for a second time")
            warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
            edit = get_peft_model(below.get_base_model(), method.train.adapter_config(), adapter_name="edit")
        return Adapted(edit, {"default": _peft(below), "edit": _peft(edit)})
    except ReftuneError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise ReftuneError(f"{method.name}: {_with_module_names(str(error), base)}") from error


def _peft(model: nn.Module) -> PeftModel:
    if not isinstance(model, PeftModel):
        raise TypeError(f"get_peft_model returned a {type(model).__name__}")
    return model


def _both(name: str, model: Any) -> tuple[PeftModel, dict[str, PeftModel]]:
    return _peft(model), {name: _peft(model)}


def _with_module_names(message: str, base: nn.Module) -> str:
    if "arget modules" not in message:
        return message
    linear = {path.rpartition(".")[2] for path, module in base.named_modules() if isinstance(module, nn.Linear)}
    return f"{message.rstrip('. ')}. The linear modules of {type(base).__name__}: {', '.join(sorted(linear))}."


def peft_config(method: Method, tokenizer: PreTrainedTokenizerBase | None = None) -> PeftConfig:
    """The configuration of a PEFT method that is no edit (of LoRA's part, where it is a pair)."""
    given, task = method.options, "CAUSAL_LM"
    if method.weights:
        return LoraConfig(
            task_type=task, r=given["rank"], lora_alpha=given["alpha"], lora_dropout=given["dropout"],
            target_modules=given["target_modules"], layers_to_transform=given["layers"],
            use_dora=method.weights == "dora",
        )  # fmt: skip
    if method.kind == "ia3":
        return IA3Config(
            task_type=task, target_modules=given["target_modules"], feedforward_modules=given["feedforward_modules"]
        )
    if method.kind == "prefix":
        return PrefixTuningConfig(
            task_type=task, num_virtual_tokens=given["virtual_tokens"], prefix_projection=given["prefix_projection"]
        )
    text: dict[str, Any] = {}
    if given["init_text"]:
        name = getattr(tokenizer, "name_or_path", None)
        text = {
            "prompt_tuning_init": "TEXT", "prompt_tuning_init_text": given["init_text"], "tokenizer_name_or_path": name
        }  # fmt: skip
    return PromptTuningConfig(task_type=task, num_virtual_tokens=given["virtual_tokens"], **text)
