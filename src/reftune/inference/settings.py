"""How answers are written, and which base model an adapter is loaded onto: what commands make their flags of."""

from __future__ import annotations

from dataclasses import dataclass

from reftune.errors import ReftuneError
from reftune.runs.recipe_values import option

WRITING, MODEL = "Writing", "Model"


@dataclass(frozen=True)
class GenerationSettings:
    """How answers are written; validated when made."""

    max_new_tokens: int = option(256, WRITING, "Longest answer, in tokens.", "tokens")
    temperature: float = option(0.0, WRITING, "0 takes the most likely token each time, above 0 samples.")
    top_p: float = option(1.0, WRITING, "Sample from the most likely tokens that make up this share.", "share, 0 to 1")
    repetition_penalty: float = option(1.0, WRITING, "Above 1 makes tokens already written less likely.")
    batch_size: int = option(8, WRITING, "Prompts of one forward pass.", "prompts")
    seed: int = option(0, WRITING, "Seed of the sampling.")
    top_k: int = option(0, WRITING, "Sample from so many of the most likely tokens; 0: from all.", "tokens")
    no_repeat_ngram: int = option(
        0, WRITING, "Write no run of so many tokens twice; 0: as the model's own settings say.", "tokens"
    )

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch_size"):
            if not 1 <= getattr(self, name) < 2**31:
                raise ReftuneError(f"{name}={getattr(self, name)}: must be at least 1, and below 2**31.")
        for name in ("top_k", "no_repeat_ngram"):
            if not 0 <= getattr(self, name) < 2**31:
                raise ReftuneError(f"{name}={getattr(self, name)}: must be at least 1; 0 switches it off.")
        # Written so that nan, which no comparison holds for, is refused too.
        if not 0 <= self.temperature <= 100:
            raise ReftuneError(f"temperature={self.temperature}: 0 is greedy, above 0 (at most 100) samples.")
        if not 0 < self.top_p <= 1:
            raise ReftuneError(f"top_p={self.top_p}: must be above 0 and at most 1.")
        if not 0 < self.repetition_penalty <= 100:
            raise ReftuneError(
                f"repetition_penalty={self.repetition_penalty}: must be above 0 and at most 100; 1 is none."
            )
        if not 0 <= self.seed < 2**32:
            raise ReftuneError(f"seed={self.seed}: must be at least 0 and below 2**32.")


@dataclass(frozen=True)
class BaseModel:
    """The base model under an adapter; None takes what the adapter's folder says."""

    model: str | None = option(None, MODEL, "Base model; default: the one it was trained on.")
    dtype: str | None = option(None, MODEL, "Data type; default: as trained.")
    device: str | None = option(None, MODEL, "cpu, cuda, ...; default: the best there is.")
    scale: float = option(1.0, MODEL, "Multiply the edit: 0.5 is half of it, below 0 the other way.")

    def __post_init__(self) -> None:
        check_scale(self.scale)


def check_scale(scale: float) -> None:
    """Refuse what an edit cannot be multiplied by.

    Raises:
        ReftuneError: no number, or one that is past a million either way.
    """
    if not abs(scale) <= 1e6:
        raise ReftuneError(f"scale={scale}: must be a number, at most a million either way.")
