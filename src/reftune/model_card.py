"""The `README.md` of an adapter folder: how to load it, what it was trained on, and what came of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from reftune.data.templates import render_prompt
from reftune.recipes import TrainRecipe

_EXAMPLE = "Who are you?"


def model_card(recipe: TrainRecipe, metrics: dict[str, Any], tokenizer: Any) -> str:
    """The card as Markdown with the front matter that the Hub reads.

    Args:
        recipe: what was trained.
        metrics: what `metrics.json` holds.
        tokenizer: renders the example prompt, so that a reader sees the template.
    """
    front = yaml.safe_dump(
        {
            "library_name": "peft",
            "base_model": _public_name(recipe.model),
            "tags": ["reft", "reftune", recipe.method],
            "pipeline_tag": "text-generation",
        },
        sort_keys=False,
    )
    prompt = render_prompt(_EXAMPLE, tokenizer, recipe.template, recipe.system_prompt)
    losses = [
        f"{name.replace('_', ' ')} {metrics[name]:.4f}" for name in ("train_loss", "eval_loss") if metrics.get(name)
    ]
    layers = recipe.layers if not isinstance(recipe.layers, list) else ", ".join(map(str, recipe.layers))
    return f"""---
{front}---

```python
import reftune
from peft import PeftModel

base, tokenizer = reftune.models.load({recipe.model!r})
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
| result | {", ".join(losses)} |

## Prompt

The positions count tokens of the prompt as it was in training, so prompts must be written the same way
(`reftune generate`, `chat` and `eval` read it from `run.yaml`). {_EXAMPLE!r} becomes:

```text
{prompt}
```

The loss is in `loss.png`, the measurements in `metrics.json`; `reftune train run.yaml` trains it again.
"""


def _public_name(name: str) -> str:
    """A local path's last part; a Hub name as it is."""
    return Path(name).name if Path(name).expanduser().exists() else name
