"""The methods that can be compared: their keys in a recipe, their configuration, and how each is put on a base model.

To add one: its keys in `_KEYS` and a branch in `peft_config` (or in `attach_method`, where it is no PEFT method; or in
`prompt_encoding`, where the prompt alone is changed).
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig
from torch import nn
from transformers import PreTrainedTokenizerBase

from reftune.adapter.config import new_adapter
from reftune.data.formats import Example, Message
from reftune.data.tokenising import Encoding
from reftune.data.values import check_text
from reftune.edits import available_edits
from reftune.errors import ReftuneError
from reftune.runs.known_settings import AUTO
from reftune.runs.recipe import DIALS, TrainRecipe, adapter_keys
from reftune.runs.recipe_values import also_known_as, check_names, read_layers, read_number, told_at
from reftune.runs.steps import attach_edit, encode_rows

WEIGHTS = ("lora", "dora")
UNTRAINED = ("base", "prompted", "few-shot")
OTHERS = ("ia3", "prefix", "prompt", "full", *UNTRAINED)

TRAINING_KEYS = (
    "lr", "warmup_ratio", "warmup_steps", "weight_decay", "optimizer", "schedule", "max_grad_norm",
    "gradient_checkpointing", "prefix_reuse",
)  # fmt: skip
"""Keys of training that a method may set for itself; the others decide data and budget, which all methods share."""


@dataclass(frozen=True)
class _Key:
    """A method's own key: how its value is read (given the key's name and the value), and what it is when absent."""

    read: Callable[[str, Any], Any]
    aka: tuple[str, ...] = ()
    default: Any = None


def _flag(key: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ReftuneError(f"{key}={value!r}: write true or false.")
    return value


def _names(key: str, value: Any) -> list[str] | str:
    """Module names; PEFT has its own for the known architectures, and for `all-linear`."""
    if value == "all-linear":
        return value
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, (list, tuple)) or not parts or not all(isinstance(part, str) for part in parts):
        raise ReftuneError(f"{key}={value!r}: write module names, such as [q_proj, v_proj], or all-linear.")
    return [part.strip() for part in parts]


def _layers(key: str, value: Any) -> list[int] | None:
    layers = read_layers(value)
    if isinstance(layers, str) and layers != "all":
        raise ReftuneError(f"{key}={value!r}: write layer numbers; places such as 8/32 are for edits.")
    return None if isinstance(layers, str) else [layers] if isinstance(layers, int) else layers


def _words(key: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ReftuneError(f"{key}={value!r}: write the instruction that stands before every prompt.")
    check_text(value, key)
    return value


_whole = partial(read_number, whole=True, least=1)
_TARGETS = {"target_modules": _Key(_names, ("modules", "targets"))}
_TOKENS = {"virtual_tokens": _Key(_whole, ("num_virtual_tokens", "tokens", "length"), 20)}
_LORA = {
    "rank": _Key(_whole, ("r",), 8),
    "alpha": _Key(read_number, ("lora_alpha",)),  # twice the rank by default
    "dropout": _Key(partial(read_number, least=0), ("lora_dropout",), 0.0),
    "layers": _Key(_layers, ("layers_to_transform",)),
    **_TARGETS,
}
_KEYS: Mapping[str, Mapping[str, _Key]] = {
    "lora": _LORA,
    "dora": _LORA,
    "ia3": {**_TARGETS, "feedforward_modules": _Key(_names)},
    "prefix": {**_TOKENS, "prefix_projection": _Key(_flag, default=False)},
    "prompt": {**_TOKENS, "init_text": _Key(lambda _, value: str(value), ("prompt_tuning_init_text",))},
    "full": {},
    "base": {},
    "prompted": {"text": _Key(_words, ("instruction", "system_prompt"))},
    "few-shot": {"examples": _Key(_whole, ("k", "shots", "few_shot"), 4)},
}
_DEFAULT_LR = {"lora": 1e-3, "dora": 1e-3, "ia3": 5e-3, "prefix": 1e-2, "prompt": 3e-2, "full": 5e-5}
"""Where neither the method nor the recipe gives one; that of edits is found for the model."""


@dataclass(frozen=True)
class Method:
    """One entry under `methods`, checked.

    Attributes:
        name: as the recipe calls it.
        kind: `lora`, `dora`, `ia3`, `prefix`, `prompt`, `full`, `base`, `prompted` (the base behind an instruction),
            `few-shot` (behind rows of training), an edit (`loreft`), or `lora+loreft`.
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
        """Whether anything is trained; the base model is only evaluated, and so it is behind other prompts."""
        return self.kind not in UNTRAINED

    @property
    def seeded(self) -> bool:
        """Whether a seed decides anything: training, or which examples stand in the prompt."""
        return self.trains or self.kind == "few-shot"

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
            parts.append(f"lr {_listed(self.train.lr)}")
        return ", ".join(parts)


def read_method(name: str, given: Any, shared: Mapping[str, Any]) -> Method:
    """Check one entry under `methods`.

    Args:
        name: its name.
        given: its keys; a bare word means `{method: word}`.
        shared: the TrainRecipe keys at the top of the recipe.

    Raises:
        ReftuneError: naming the method, the key, its value and the way out.
    """
    with told_at(name):
        if given is not None and not isinstance(given, (str, Mapping)):
            raise ReftuneError(f"{given!r}: write `{{method: loreft, ...}}`.")
        values: dict[str, Any] = {"method": given} if isinstance(given, str) else dict(given or {})
        kind = _kind(values.pop("method", name))
        weights, plus, _ = kind.partition("+")
        edits = bool(plus) or kind not in (*WEIGHTS, *OTHERS)
        keys = _LORA if plus else _KEYS.get(kind, {})
        prefix = "lora_" if plus else ""  # plain keys are the edit's, LoRA's carry its name
        own = {prefix + key: () if plus else item.aka for key, item in keys.items()}
        trained = [key for key in TRAINING_KEYS if key != "prefix_reuse" or (edits and not plus)]
        names = also_known_as(TrainRecipe)
        known = own | {
            key: names[key]
            for key in (*((*DIALS, *adapter_keys()[1:]) if edits else ()), *(() if kind in UNTRAINED else trained))
        }
        others = [word for words in own.values() for word in words]
        for key in values:
            if key in names and key not in (*known, *DIALS, *adapter_keys(), *TRAINING_KEYS, *others):
                raise ReftuneError(f"{key!r} is shared by all methods; write it at the top of the recipe.")
        check_names(values, {"method": (), **known})
        settings = {key: value for key, value in values.items() if key not in own}
        if not edits and values.get("lr", shared.get("lr", AUTO)) == AUTO:
            settings["lr"] = _DEFAULT_LR.get(kind, 1e-3)
        if plus or not edits:
            settings["prefix_reuse"] = "off"  # what these train lies under every token
        if edits:
            settings["method"] = kind.partition("+")[2] or kind
        options = {
            key: item.default if (value := values.get(prefix + key)) is None else item.read(key, value)
            for key, item in keys.items()
        }
        if kind == "prompted" and options["text"] is None:
            raise ReftuneError("text is missing: write the instruction that stands before every prompt.")
        if "alpha" in options:
            options["alpha"] = options["alpha"] or 2.0 * options["rank"]
        method = Method(name, kind, TrainRecipe(**{**shared, **settings}), options)
        if method.weights or not edits and kind not in ("full", *UNTRAINED):
            try:
                peft_config(method)
            except (ValueError, TypeError) as error:  # PEFT's own checks
                raise ReftuneError(str(error)) from None
    return method


def _kind(value: Any) -> str:
    kind = str(value).strip().lower()
    weights, plus, edit = (part.strip() for part in kind.partition("+"))
    if not plus:
        check_names([kind], dict.fromkeys((*OTHERS, *WEIGHTS, *available_edits()), ()), what="method")
        return kind
    if weights not in WEIGHTS or edit not in available_edits():
        raise ReftuneError(
            f"method={value!r}: a pair is LoRA or DoRA and an edit, such as lora+loreft; the edits are "
            f"{', '.join(available_edits())}."
        )
    return f"{weights}+{edit}"


def _listed(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


# On a model


@dataclass(frozen=True)
class Adapted:
    """A base model with a method on it.

    Attributes:
        model: what the trainer trains; the base model itself for `full` and where nothing is trained.
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
        if method.kind in ("full", *UNTRAINED):
            for parameter in base.parameters():
                parameter.requires_grad_(method.kind == "full" and parameter.is_floating_point())
            return Adapted(base, {})
        if method.edits and method.weights is None:
            alone = attach_edit(base, method.train.fitted(base))
            return Adapted(alone, {"default": alone})
        below = new_adapter(base, peft_config(method, tokenizer))
        if not method.edits:
            return Adapted(below, {"default": below})
        plain = below.get_base_model()
        # The second is made on what is under the first, under a name of its own.
        with warnings.catch_warnings():  # PEFT warns of a second one by accident; this is on purpose
            warnings.filterwarnings("ignore", message="You are trying to modify a model with PEFT for a second time")
            warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
            edit = attach_edit(plain, method.train.fitted(plain), adapter_name="edit")
        return Adapted(edit, {"default": below, "edit": edit})
    except ReftuneError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise ReftuneError(f"{method.name}: {_with_module_names(str(error), base)}") from error


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


# Before a prompt


def prompt_encoding(method: Method, encoding: Encoding, train: Sequence[Example], seed: int) -> Encoding:
    """How a method reads prompts: `prompted` behind its instruction, `few-shot` behind examples that the seed chooses.

    What stands before a prompt counts towards the model's context and not towards the row length of training; nothing
    is cut for it.

    Args:
        method: the method.
        encoding: of the other methods, with the model's context as its limit.
        train: the rows that examples are taken from; their system messages are left out.
        seed: of the run.

    Raises:
        ReftuneError: there are fewer rows than examples.
    """
    if method.kind == "prompted":
        return replace(encoding, before=(Message("system", method.options["text"]),), on_long_prompt="error")
    if method.kind != "few-shot":
        return encoding
    wanted = method.options["examples"]
    if wanted > len(train):
        raise ReftuneError(f"{method.name}: examples={wanted}: there are {len(train)} rows of training.")
    turns: list[Message] = []
    for row in random.Random(seed).sample(list(train), wanted):
        turns += [message for message in row.messages if message.role != "system"]
        turns.append(Message("assistant", row.completion, row.more))
    return replace(encoding, before=tuple(turns), on_long_prompt="error")


def judged_rows(
    method: Method, rows: Sequence[Example], settings: TrainRecipe, tokenizer: Any, encoding: Encoding
) -> Any:
    """Held-out rows as a method is judged on them: behind other prompts, the supervised tokens are the same.

    Args:
        method: the method.
        rows: the held-out rows.
        settings: as the rows are encoded for methods that are trained.
        tokenizer: the base model's.
        encoding: of `prompt_encoding`.

    Raises:
        ReftuneError: a row that does not fit the model's context, or whose supervised tokens would be others.
    """
    plain = encode_rows(rows, settings, tokenizer)
    if not encoding.before:
        return plain
    with told_at(method.name):
        for row, (prompt, completion), own in zip(rows, encoding.turn_ids(rows), plain, strict=True):
            length, where = len(prompt) + len(completion), row.where or "a held-out row"
            if encoding.limit is not None and length > encoding.limit:
                raise ReftuneError(
                    f"{where}: behind what stands before it, the row ends at token {length}, and the model takes "
                    f"{encoding.limit}: {_shorter(method)}."
                )
            if completion != own["input_ids"][own["prompt_length"] :]:
                raise ReftuneError(
                    f"{where}: its supervised tokens would not be those of the other methods, because "
                    f"max_length={settings.max_length} cuts its completion: raise max_length."
                )
        return encoding.dataset(rows)


def _shorter(method: Method) -> str:
    return "give fewer examples" if method.kind == "few-shot" else "write a shorter text"
