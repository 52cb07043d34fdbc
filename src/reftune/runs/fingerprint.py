"""What a run was trained on and with: a resumed run must be the same run."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from reftune.data.streaming import StreamedRows
from reftune.errors import ReftuneError
from reftune.output.json_files import read_json_object
from reftune.runs.known_settings import AUTO
from reftune.runs.recipe import RUN_FILE, TrainRecipe, recipe_fields
from reftune.runs.recipe_values import read_yaml
from reftune.training.prefix.base_identity import tensor_values

FINGERPRINT_FILE = "fingerprint.json"
_HARMLESS = (
    "test_file", "device", "gradient_checkpointing", "prefix_reuse", "epochs", "max_steps", "log_every", "eval_steps",
    "save_steps", "save_total_limit", "output", "resume", "overwrite", "show", "tensorboard", "wandb", "report_to",
    "cohort_tokens",
)  # fmt: skip
"""Fields that a resumed run may change: they do not change the steps that are done (more epochs come after them)."""
_ROWS_OF_A_STEP = ("batch_size", "gradient_accumulation", "processes")
"""Fields whose product counts: the rows of an optimiser's step."""
_DIGESTED = {
    "train_file": "training rows",
    "eval_file": "held-out rows",
    "model": "base model's weights",
    "adapter_column": "users",
}
"""Fields whose content counts rather than their name, and what the content is called."""


def fingerprint(train_set: Any, eval_set: Any, base: str, dtype: torch.dtype | None = None) -> dict[str, str]:
    """Digests of what a recipe only names, by field.

    Args:
        train_set: the tokenised rows.
        eval_set: the held-out ones, or None.
        base: see `base_digest`.
        dtype: of the base.
    """
    return {
        "train_file": _rows_digest(train_set), "eval_file": _rows_digest(eval_set), "model": base, "dtype": str(dtype),
    }  # fmt: skip


def base_digest(base: nn.Module) -> str:
    """A digest of a base model's weights, before anything is attached to it."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in base.named_parameters():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {tensor_values(tensor)}".encode())
    return digest.hexdigest()


def other_base(folder: Path, base: nn.Module, digest: Callable[[nn.Module], str] = base_digest) -> str | None:
    """What to say where a run was trained on other weights than a base's, in the same dtype; else None.

    Another dtype or a quantised base has other bits, and folders without a fingerprint say nothing: neither is told.

    Args:
        folder: of an adapter.
        base: before anything is attached to it.
        digest: `base_digest`, or what remembers it.

    Raises:
        ReftuneError: a fingerprint that is damaged.
    """
    known = folder / FINGERPRINT_FILE
    found = read_json_object(known, "restore it, or delete it") if known.is_file() else {}
    if found.get("dtype") != str(base.dtype) or found.get("model") == digest(base):
        return None
    return (
        f"{folder} was trained on other weights than those of this base model, though their shapes agree: what it does "
        "here was never measured. Name the base that it was trained on."
    )


def write_fingerprint(folder: Path, found: Mapping[str, str]) -> None:
    """Write it beside `run.yaml`."""
    from reftune.output.files import write_text

    write_text(folder / FINGERPRINT_FILE, json.dumps(found, indent=2) + "\n")


def check_resumed(recipe: TrainRecipe, folder: Path, found: Mapping[str, str]) -> None:
    """Compare what is asked with what the run in a folder was trained with.

    Raises:
        ReftuneError: naming what differs, with both values.
    """
    if not (folder / RUN_FILE).is_file():
        return
    before: dict[str, Any] = {item.name: item.default for item in recipe_fields()} | read_yaml(folder / RUN_FILE)
    now: dict[str, Any] = yaml.safe_load(recipe.to_yaml())
    recorded: dict[str, Any] = {}
    if (folder / FINGERPRINT_FILE).is_file():
        recorded = read_json_object(folder / FINGERPRINT_FILE, "train again, without --resume")
    harmless = set(_HARMLESS) - ({"epochs"} if recipe.adapter_column else set())  # users who are done stay as they are
    sizes = [before[name] for name in _ROWS_OF_A_STEP]
    if AUTO not in (recipe.batch_size, *sizes) and math.prod(sizes) == recipe.rows_of_a_step:
        harmless |= {*_ROWS_OF_A_STEP}
    by_content = set(_DIGESTED) & set(recorded)
    differ = {name for name in by_content if recorded[name] != found[name]}
    changed = [f"other {what}" for name, what in _DIGESTED.items() if name in differ]
    changed += [
        f"{name}={before.get(name)!r} before, {now[name]!r} now"
        for name in now
        if name not in harmless and name not in by_content and before.get(name) != now[name]
    ]
    if changed:
        raise ReftuneError(
            f"resume: {folder} holds a run of something else ({'; '.join(changed)}): go on with what it was trained "
            f"with (reftune train {folder / RUN_FILE} --resume), or train without --resume, into another folder or "
            "with --overwrite."
        )


def _rows_digest(rows: Any) -> str:
    if isinstance(rows, StreamedRows):
        return rows.digest()
    digest = hashlib.blake2b(digest_size=16)
    for batch in [] if rows is None else rows.iter(batch_size=1000):
        digest.update(repr(sorted(batch.items())).encode())
    return digest.hexdigest()
