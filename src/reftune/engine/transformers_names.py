"""What transformers calls otherwise in some of the versions that we take: the one place that knows both names.

| from 5.23 | before |
|---|---|
| `activation_checkpointing_enable` of a model | `gradient_checkpointing_enable` |
| `is_activation_checkpointing` of a model | `is_gradient_checkpointing` |
| `activation_checkpointing_kwargs` of training arguments | `gradient_checkpointing_kwargs` |


| from 5.17 | before |
|---|---|
| `page_size` of continuous batching | `block_size` |

Later versions keep the earlier names for a time, and warn where they are used.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_LATER, _EARLIER = "activation_checkpointing", "gradient_checkpointing"


def checkpoints_activations(model: Any) -> bool:
    """Whether a model recomputes activations in backward; False for one that does not know of it."""
    return bool(_either(model, f"is_{_LATER}", f"is_{_EARLIER}", False))


def enable_checkpointing(model: Any, settings: dict[str, Any] | None = None) -> None:
    """Let a model recompute activations in backward; **changes the model**.

    Args:
        model: of transformers, or a PEFT model over one.
        settings: for `torch.utils.checkpoint`, such as `{"use_reentrant": False}`.
    """
    _either(model, f"{_LATER}_enable", f"{_EARLIER}_enable")(settings)


def checkpointing_settings(arguments: Any) -> dict[str, Any]:
    """The settings for `torch.utils.checkpoint` that training arguments hold."""
    return _either(arguments, f"{_LATER}_kwargs", f"{_EARLIER}_kwargs", None) or {}


def checkpointing_arguments(on: bool, settings: dict[str, Any] | None = None) -> dict[str, Any]:
    """Training arguments that switch recomputing on or off, by the names of the transformers that is installed."""
    from transformers import TrainingArguments

    name = _LATER if _LATER in TrainingArguments.__dataclass_fields__ else _EARLIER
    return {name: on, f"{name}_kwargs": settings}


def page_of(tokens: int) -> dict[str, Any]:
    """Settings of continuous batching whose cache has pages of so many tokens."""
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    return {"page_size" if "page_size" in ContinuousBatchingConfig.__dataclass_fields__ else "block_size": tokens}


@contextmanager
def peft_may_read_earlier_names() -> Iterator[None]:
    """No warning in the ``with`` block of a name that PEFT reads off every base model that it puts an adapter on."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", f"`is_{_EARLIER}` is deprecated", FutureWarning)
        yield


def _either(owner: Any, later: str, earlier: str, *default: Any) -> Any:
    return getattr(owner, later) if hasattr(owner, later) else getattr(owner, earlier, *default)
