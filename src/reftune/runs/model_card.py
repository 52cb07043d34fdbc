"""The `README.md` of an adapter folder: how to load it, what it was trained on, and what came of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from reftune.data.templates import render_prompt
from reftune.output.documents import rendered
from reftune.runs.recipe import TrainRecipe

_EXAMPLE = "Who are you?"


def model_card(recipe: TrainRecipe, metrics: dict[str, Any], tokenizer: Any) -> str:
    """The card as Markdown with the front matter that the Hub reads.

    Args:
        recipe: what was trained.
        metrics: what `metrics.json` holds.
        tokenizer: renders the example prompt, so that a reader sees the template.
    """
    classifies = recipe.task == "classification"
    front = {
        "library_name": "peft",
        "base_model": _public_name(recipe.model),
        "tags": ["reft", "reftune", recipe.method],
        "pipeline_tag": "text-classification" if classifies else "text-generation",
    }
    results = [
        f"{name.replace('_', ' ')} {metrics[name]:.4f}"
        for name in ("train_loss", "eval_loss", "reward", "eval_reward", "reward_margin", "reward_accuracy")
        if metrics.get(name)
    ]
    for part in ("validation", "test", "test_mismatched", "test_file"):
        if isinstance(score := metrics.get(part), dict):
            low, high = score["intervals"][score["metric"]]
            results.append(f"{part.replace('_', ' ')} {score['metric']} {score['score']:.3f} ({low:.3f} to {high:.3f})")
    labels = metrics["labels"] if classifies else None
    content = {
        "recipe": recipe,
        "metrics": metrics,
        "front": yaml.safe_dump(front, sort_keys=False),
        "model": _public_name(recipe.model),
        "rows": _public_name(recipe.train_file),
        "layers": ", ".join(map(str, recipe.layers)) if isinstance(recipe.layers, list) else recipe.layers,
        "results": results,
        "labels": labels,
        "outputs": 1 if isinstance(labels, str) else len(labels or ()),
        "example": _EXAMPLE,
        "prompt": "" if labels else render_prompt(_EXAMPLE, tokenizer, recipe.template, recipe.system_prompt),
    }
    return rendered("reftune.runs", "README.md", content)


def _public_name(name: str) -> str:
    """A local path's last part; a Hub name as it is."""
    return Path(name).name if Path(name).expanduser().exists() else name
