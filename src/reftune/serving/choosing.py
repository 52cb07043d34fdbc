"""Which engine serves a model: vLLM where it is installed and can, else the embedded one; with the reason."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import fields
from importlib import import_module

from reftune.errors import ReftuneError
from reftune.serving.settings import KEYS, ServerSettings

ENGINES = ("auto", "embedded", "vllm")
VLLM_FLAGS = {
    "base_name": "--served-model-name",
    "dtype": "--dtype",
    "max_model_len": "--max-model-len",
    "batch_tokens": "--max-num-batched-tokens",
}
"""Settings that vLLM has too, by its names."""


def choose_engine(
    wanted: str, model: str, adapters: Sequence[str] = (), settings: ServerSettings | None = None
) -> tuple[str, str]:
    """The engine to use, and a line that says why it is not vLLM where that was left open.

    Args:
        wanted: ``auto``, ``embedded`` or ``vllm``.
        model: the base model.
        adapters: folders of its adapters.
        settings: how to serve it.

    Raises:
        ReftuneError: an engine that does not exist, or vLLM where it is missing, cannot serve the model, or lacks a
            setting that was given.
    """
    if wanted not in ENGINES:
        raise ReftuneError(f"--engine {wanted}: choose one of {', '.join(ENGINES)}.")
    if wanted == "embedded":
        return "embedded", ""
    reason = _why_not_vllm(model, adapters, settings or ServerSettings())
    if wanted == "vllm":
        if reason:
            raise ReftuneError(f"--engine vllm: {reason}.")
        return "vllm", ""
    return ("embedded", f"Serving with the embedded engine: {reason}.") if reason else ("vllm", "")


def refuse_extra(arguments: Sequence[str]) -> None:
    """Refuse options that only `vllm serve` knows.

    Raises:
        ReftuneError: naming the first.
    """
    if arguments:
        raise ReftuneError(
            f"{arguments[0]}: no such option of the embedded engine; --engine vllm passes it on to vLLM."
        )


def vllm_flags(settings: ServerSettings) -> list[str]:
    """What `vllm serve` is told of the settings that were given, beside its address."""
    given = _given(settings)
    return [part for name, flag in VLLM_FLAGS.items() if name in given for part in (flag, str(given[name]))]


def _given(settings: ServerSettings) -> dict[str, object]:
    """The settings that are not their defaults."""
    return {f.name: value for f in fields(settings) if (value := getattr(settings, f.name)) != f.default}


def _why_not_vllm(model: str, adapters: Sequence[str], settings: ServerSettings) -> str | None:
    if importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed (pip install vllm)"
    if settings.api_keys or os.environ.get(KEYS):
        return f"--api-keys and {KEYS} are the embedded engine's; vLLM takes --api-key KEY"
    if own := sorted(_given(settings).keys() - {"host", "port", "ui", *VLLM_FLAGS}):
        return f"--{own[0].replace('_', '-')} is an option of the embedded engine alone"
    return import_module("reftune.serving.vllm.launch").supported(model, adapters)
