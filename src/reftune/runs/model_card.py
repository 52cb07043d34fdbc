"""The `README.md` of an adapter folder: how to load it, what it was trained on, and what came of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from reftune.data.templates import render_prompt
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
    front = yaml.safe_dump(
        {
            "library_name": "peft",
            "base_model": _public_name(recipe.model),
            "tags": ["reft", "reftune", recipe.method],
            "pipeline_tag": "text-classification" if classifies else "text-generation",
        },
        sort_keys=False,
    )
    results = [
        f"{name.replace('_', ' ')} {metrics[name]:.4f}" for name in ("train_loss", "eval_loss") if metrics.get(name)
    ]
    for part in ("validation", "test", "test_mismatched", "test_file"):
        if isinstance(score := metrics.get(part), dict):
            low, high = score["intervals"][score["metric"]]
            results.append(f"{part.replace('_', ' ')} {score['metric']} {score['score']:.3f} ({low:.3f} to {high:.3f})")
    options = f', task="seq_cls", num_labels={_outputs(metrics)}' if classifies else ""
    how = _labels_section(metrics) if classifies else _prompt_section(recipe, tokenizer)
    layers = recipe.layers if not isinstance(recipe.layers, list) else ", ".join(map(str, recipe.layers))
    return f"""---
{front}---

```python
import reftune
from peft import PeftModel

base, tokenizer = reftune.models.load({recipe.model!r}{options})
model = PeftModel.from_pretrained(base, "this-folder")
```

# A ReFT adapter of {_public_name(recipe.model)}

It edits hidden states and changes no weight (representation finetuning, arXiv 2404.03592). `import reftune` comes
first: without it PEFT does not know this kind of adapter.

| | |
|---|---|
| method | {recipe.method}, rank {recipe.rank} |
| where | {recipe.component}, layers {layers} |
| positions | `{recipe.positions}` |
| trainable parameters | {metrics["trainable_parameters"]:,} |
| trained on | {metrics["train_rows"]} rows of `{_public_name(recipe.train_file)}` |
| training | {recipe.epochs:g} epochs, batches of {recipe.batch_size}, learning rate {recipe.lr:g}, seed {recipe.seed} |
| result | {", ".join(results)} |

{how}
The loss is in `loss.png`, the measurements in `metrics.json`; `reftune train run.yaml` trains it again.
"""


def _prompt_section(recipe: TrainRecipe, tokenizer: Any) -> str:
    prompt = render_prompt(_EXAMPLE, tokenizer, recipe.template, recipe.system_prompt)
    return f"""## Prompt

The positions count tokens of the prompt as it was in training, so prompts must be written the same way
(`reftune generate`, `chat` and `eval` read it from `run.yaml`). {_EXAMPLE!r} becomes:

```text
{prompt}
```
"""


def _labels_section(metrics: dict[str, Any]) -> str:
    labels = metrics["labels"]
    meaning = (
        "The head has one output, the predicted number."
        if isinstance(labels, str)
        else "The head's outputs, in order: " + ", ".join(f"`{name}`" for name in labels) + "."
    )
    return f"""## Labels

{meaning} The head was trained with the edits and is saved with them.
`reftune predict this-folder --file rows.csv` labels texts.
"""


def _outputs(metrics: dict[str, Any]) -> int:
    return 1 if isinstance(metrics["labels"], str) else len(metrics["labels"])


def _public_name(name: str) -> str:
    """A local path's last part; a Hub name as it is."""
    return Path(name).name if Path(name).expanduser().exists() else name
