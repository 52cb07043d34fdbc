"""The `README.md` of an adapter folder: how to load it, what it was trained on, and what came of it."""

from __future__ import annotations

from typing import Any

import yaml

from reftune.data.templates import resolve_template
from reftune.models import public_name
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
        "base_model": public_name(recipe.model),
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
        "model": public_name(recipe.model),
        "rows": public_name(recipe.train_file),
        "layers": ", ".join(map(str, recipe.layers)) if isinstance(recipe.layers, list) else recipe.layers,
        "results": results,
        "labels": labels,
        "outputs": 1 if isinstance(labels, str) else len(labels or ()),
        "example": _EXAMPLE,
        "prompt": "" if labels else recipe.encoding(tokenizer).render(_EXAMPLE),
        "special_tokens": resolve_template(tokenizer, recipe.template) is not None,
    }
    return rendered("reftune.runs", "README.md", content)
