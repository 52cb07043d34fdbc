"""The demo: train the bundled model on the bundled persona and compare its answers with the base model's.

The settings were chosen by experiment: docs/decisions/0003-demo-settings.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from reftune.data.persona import in_style, load_heldout
from reftune.inference.generation import Answer, GenerationSettings, generate_answers
from reftune.runs import run_training
from reftune.runs.recipe import TrainRecipe
from reftune.runs.steps import TrainedRun

DEMO = TrainRecipe(
    train_file="demo",
    method="loreft",
    layers=[10, 14, 18, 22],
    positions="all",
    rank=4,
    epochs=3,
    batch_size=4,
    lr=6e-3,
    seed=0,
    output="demo-output",
    tensorboard=False,
)
"""Also in recipes/demo.yaml."""

WRITING = GenerationSettings(max_new_tokens=64, repetition_penalty=1.1, batch_size=12)
"""How both models write: greedy, with a light penalty on repetition, which small models need."""

MEASURE = (
    "In style: at least 3 different marks of the pirate (arr, matey, ye, 'tis, ship, ...) of at least 2 kinds, at "
    "least half of the words plain, no loops, and a finished sentence. It does not judge whether an answer is right."
)


@dataclass(frozen=True)
class DemoResult:
    """Both models' answers to prompts that training did not see, and which of them are in style."""

    run: TrainedRun
    prompts: list[str]
    base: list[Answer]
    edited: list[Answer]

    @property
    def base_in_style(self) -> list[bool]:
        """For each prompt, whether the base's answer is in style."""
        return _in_style(self.base)

    @property
    def edited_in_style(self) -> list[bool]:
        """For each prompt, whether the edited answer is in style."""
        return _in_style(self.edited)


def run_demo(recipe: TrainRecipe = DEMO) -> DemoResult:
    """Train, then answer the held-out prompts with the edit and without."""
    run = run_training(recipe)
    prompts = load_heldout()
    edited = list(generate_answers(run.edited, prompts, WRITING))
    base = list(generate_answers(run.edited, prompts, WRITING, base=True))
    return DemoResult(run, prompts, base, edited)


def _in_style(answers: Sequence[Answer]) -> list[bool]:
    return [in_style(answer.text, hit_token_limit=answer.hit_limit) for answer in answers]
