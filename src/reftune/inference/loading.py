"""Load an adapter folder with its base model, its tokenizer and the prompt format that it was trained with."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from reftune import models
from reftune.adapter.checkpoint import CONFIG_FILE, read_adapter_config, read_weights
from reftune.adapter.config import load_adapter
from reftune.adapter.expression import check_shared, edit_together, parse_expression
from reftune.adapter.tuner import REFT, ReftModel
from reftune.data.templates import resolve_template
from reftune.data.tokenising import Encoding
from reftune.errors import ReftuneError
from reftune.inference.settings import check_scale
from reftune.runs.fingerprint import other_base
from reftune.runs.recipe import RUN_FILE, TrainRecipe
from reftune.runs.recipe_values import (
    coerce,
    read_chat_template_kwargs,
    read_columns,
    read_labels,
    read_yaml,
    told_at,
    typed_fields,
)

logger = logging.getLogger(__name__)

_NO_LIMIT = 10_000_000
"""Tokenizers without a limit state an enormous one."""
_EXPRESSION = re.compile(r"\*|\s[+-](\s|$)|^\s*[+-]")
"""What a folder's name seldom has, and an expression always."""
_TEXTS = ("model", "dtype", "template", "system_prompt")
_CHOICES = ("quantization", "glue", "metric", "max_length")
_READERS: dict[str, Callable[[Any], Any]] = {
    "columns": read_columns,
    "labels": read_labels,
    "chat_template_kwargs": read_chat_template_kwargs,
}
"""What inference reads of `run.yaml`."""


@dataclass(frozen=True)
class EditedModel:
    """A base model with an adapter on it, and how it is spoken to.

    Attributes:
        model: the PEFT model, in evaluation mode; `model.disable_adapter()` gives the base.
        tokenizer: the one saved beside the adapter, else the base model's.
        encoding: how prompts become tokens, as in training; its limit is the model's context.
        folder: where the adapter came from; None for one that was just trained.
        loaded: of several adapters, the name of each on the model.
        strengths: of those that edit together, by that name, as the expression says.
    """

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    encoding: Encoding
    folder: Path | None = None
    loaded: dict[Path, str] = field(default_factory=dict)
    strengths: dict[str, float] = field(default_factory=dict)


def load_edited(
    folder: str | Path,
    *,
    model: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
    quantization: Any = None,
    scale: float = 1.0,
    template: str | None = None,
    system_prompt: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | str | None = None,
) -> EditedModel:
    """Load an adapter folder onto its base model.

    Args:
        folder: an output folder of `reftune train`, one of its checkpoints, or an adapter that PEFT saved.
        model: another name or folder of the base model than the one recorded.
        dtype: as in training where None.
        device: the best there is where None.
        quantization: as in training where None.
        scale: multiplies what the edit adds.
        template: another than in training (see `data.templates`).
        system_prompt: another than in training.
        chat_template_kwargs: others than in training, by name or as `enable_thinking=false`.

    Raises:
        ReftuneError: the folder, its files or its base model cannot be used.
    """
    folder, name, recorded = adapter_folder(folder, model, classifier=False)
    base, tokenizer = models.load(
        name, dtype or recorded.get("dtype"), device, quantization=quantization or recorded.get("quantization")
    )
    warning = other_base(folder, base)
    encoding = recorded_encoding(folder, tokenizer, template, system_prompt, chat_template_kwargs)
    models.fit_to_tokenizer(base, encoding.tokenizer)
    edited = load_adapter(base, folder)
    if warning:
        logger.warning(warning)
    edited.eval()
    set_scale(edited, scale)
    return EditedModel(edited, encoding.tokenizer, within_context(encoding, base), folder)


def load_mixture(written: str | Path, *, scale: float = 1.0, **options: Any) -> EditedModel:
    """Load the adapters of an expression over their folders, as ``0.5*pirate + 0.3*formal``, or one folder.

    Base model, tokenizer and prompt format are the first one's, as the server has it.

    Args:
        written: a folder, or an expression.
        scale: multiplies every strength.
        **options: as for ``load_edited``.

    Raises:
        ReftuneError: no expression, or a folder that cannot be used or does not fit the first one's base model.
    """
    terms = adapter_folders(written)
    edited = load_edited(terms[0][0], scale=scale, **options)
    if terms[1:] or terms[0][1] != 1.0:
        mix(edited, str(written), scale)
    return edited


def adapter_folders(written: str | Path) -> list[tuple[Path, float]]:
    """The folders of an expression over folders, with their strengths; a folder that is there is itself one.

    Raises:
        ReftuneError: it is neither.
    """
    text, folder = str(written), Path(written).expanduser()
    if text.strip() and (folder.is_dir() or not _EXPRESSION.search(text)):
        return [(folder, 1.0)]
    return [(Path(name).expanduser(), weight) for name, weight in parse_expression(text)]


def single_folder(written: str | Path) -> Path:
    """The folder of one adapter, where an expression of several would have no meaning.

    Raises:
        ReftuneError: an expression.
    """
    (folder, weight), *others = adapter_folders(written)
    if others or weight != 1.0:
        raise ReftuneError(
            f"adapter expression {str(written)!r}: this takes the folder of one adapter; generate, chat, eval (of "
            "adapters that write text) and serve take several with strengths."
        )
    return folder


def mix(edited: EditedModel, written: str, scale: float = 1.0) -> list[tuple[Path, float]]:
    """Let adapters edit together, as an expression says; **changes the model**, loading those that it does not have.

    Args:
        edited: the model.
        written: an expression over folders; one that is loaded may be named by its last part.
        scale: multiplies every strength.

    Returns:
        The folders and their strengths.

    Raises:
        ReftuneError: no expression, or a folder that cannot be used or does not fit the base model; nothing has changed
            but what is loaded.
    """
    tuner: Any = edited.model.base_model
    if not isinstance(tuner, ReftModel):
        raise ReftuneError(f"adapter expression {written!r}: {edited.folder} is no ReFT adapter, and cannot be mixed.")
    loaded = edited.loaded
    if not loaded and edited.folder is not None:
        loaded[edited.folder.resolve()] = "default"
    by_name = {folder.name: folder for folder in loaded}
    terms = [
        (by_name[str(folder)] if str(folder) in by_name and not folder.is_dir() else folder.resolve(), weight)
        for folder, weight in adapter_folders(written)
    ]
    for folder, _ in terms:
        if folder not in loaded:
            config = read_adapter_config(folder)
            read_weights(folder, config)
            if config.get("peft_type") != REFT:
                raise ReftuneError(f"adapter expression {written!r}: {folder} is no ReFT adapter, and cannot be mixed.")
            name = f"adapter{len(loaded)}"
            edited.model.load_adapter(str(folder), adapter_name=name)
            edited.model.eval()
            loaded[folder] = name
    names = [loaded[folder] for folder, _ in terms]
    if len(set(names)) < len(names):
        raise ReftuneError(f"adapter expression {written!r}: two terms are one folder; write it once.")
    check_shared(tuner.peft_config, names)
    edited.strengths.clear()
    edited.strengths.update({loaded[folder]: weight for folder, weight in terms})
    edit_together(tuner.engine, [(name, weight * scale) for name, weight in edited.strengths.items()])
    return terms


def set_scale(model: PeftModel, scale: float, strengths: Mapping[str, float] | None = None) -> None:
    """Multiply what the adapter adds to hidden states, or several with strengths; **changes the model**.

    Raises:
        ReftuneError: a scale that is no number, or an adapter that is no ReFT adapter.
    """
    check_scale(scale)
    if isinstance(model.base_model, ReftModel):
        for name, strength in (strengths or {"default": 1.0}).items():
            model.base_model.set_scale(name, scale * strength)
    elif scale != 1.0:
        raise ReftuneError(f"scale={scale}: this adapter is no ReFT adapter; leave --scale out.")


def adapter_folder(folder: str | Path, model: str | None, *, classifier: bool) -> tuple[Path, str, dict[str, Any]]:
    """An adapter's folder, the name of its base model (`model` where given), and its `run.yaml`.

    Raises:
        ReftuneError: its files cannot be used, it does not say its base model, or it is of the other kind.
    """
    folder = single_folder(folder)
    config = read_adapter_config(folder)
    read_weights(folder, config)
    if classifier and config.get("task_type") != "SEQ_CLS":
        raise ReftuneError(
            f"{folder / CONFIG_FILE}: task_type is {config.get('task_type')!r}, not 'SEQ_CLS': this adapter writes "
            "text; use `reftune generate`."
        )
    if not classifier and config.get("task_type") == "SEQ_CLS":
        raise ReftuneError(f"{folder} is a classifier, which writes nothing: use `reftune predict` or `reftune eval`.")
    recorded = recorded_run(folder)
    name = model or config.get("base_model_name_or_path") or recorded.get("model")
    if not name:
        raise ReftuneError(f"{folder} does not say which base model it belongs to: name it with --model.")
    return folder, name, recorded


def recorded_encoding(
    folder: Path,
    tokenizer: Any,
    template: str | None = None,
    system_prompt: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | str | None = None,
) -> Encoding:
    """How prompts become tokens for an adapter: as its own tokenizer and its `run.yaml` say, but for what is given."""
    recorded = recorded_run(folder)
    return Encoding(
        models.saved_tokenizer(folder, tokenizer),
        template if template is not None else recorded.get("template"),
        system_prompt if system_prompt is not None else recorded.get("system_prompt"),
        on_long_prompt="error",
        chat_template_kwargs=read_chat_template_kwargs(
            chat_template_kwargs if chat_template_kwargs is not None else recorded.get("chat_template_kwargs")
        ),
    )


def recorded_run(folder: Path) -> dict[str, Any]:
    """The `run.yaml` of an output folder, or of the one that a checkpoint lies in; empty where there is none.

    Raises:
        ReftuneError: it cannot be read, or a key that inference reads is not of its type; names the file and the key.
    """
    for place in (folder, folder.parent) if folder.name.startswith("checkpoint-") else (folder,):
        if (place / RUN_FILE).is_file():
            with told_at(str(place / RUN_FILE)):
                return _checked(read_yaml(place / RUN_FILE))
    return {}


def _checked(recorded: dict[str, Any]) -> dict[str, Any]:
    for item, kind in typed_fields(TrainRecipe):
        value = recorded.get(item.name)
        if value is None:
            continue
        if item.name in _READERS:
            recorded[item.name] = _READERS[item.name](value)
        elif item.name in _TEXTS and not isinstance(value, str):
            raise ReftuneError(f"{item.name}={value!r}: give text.")
        elif item.name in _CHOICES:
            recorded[item.name] = coerce(item, kind, value)
    if recorded.get("template") is not None:
        resolve_template(None, recorded["template"])
    return recorded


def within_context(encoding: Encoding, base: Any) -> Encoding:
    """The encoding with the model's context as its limit, not the row length of training."""
    stated = [encoding.tokenizer.model_max_length, getattr(base.config, "max_position_embeddings", None)]
    limits = [int(limit) for limit in stated if isinstance(limit, int) and 2 <= limit < _NO_LIMIT]
    return replace(encoding, max_length=min(limits) if limits else None)
