"""Which engine serves a model: vLLM where it is installed and can, else the embedded one; with the reason."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from importlib import import_module

from reftune.errors import ReftuneError

ENGINES = ("auto", "embedded", "vllm")


def choose_engine(wanted: str, model: str, adapters: Sequence[str] = ()) -> tuple[str, str]:
    """The engine to use, and a line that says why it is not vLLM where that was left open.

    Args:
        wanted: ``auto``, ``embedded`` or ``vllm``.
        model: the base model.
        adapters: folders of its adapters.

    Raises:
        ReftuneError: an engine that does not exist, or vLLM where it is missing or cannot serve the model.
    """
    if wanted not in ENGINES:
        raise ReftuneError(f"--engine {wanted}: choose one of {', '.join(ENGINES)}.")
    if wanted == "embedded":
        return "embedded", ""
    reason = _why_not_vllm(model, adapters)
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


def _why_not_vllm(model: str, adapters: Sequence[str]) -> str | None:
    if importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed (pip install vllm)"
    return import_module("reftune.serving.vllm.launch").supported(model, adapters)
