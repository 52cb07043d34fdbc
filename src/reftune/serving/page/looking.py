"""What an adapter edits and does, as pictures and words; `python -m reftune.serving.page.looking` for the second.

The explanation runs the model with the adapter alone, so it has a process of its own and leaves the server's model be.
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

PROMPTS = ("Who are you?", "What is the capital of France?", "How do I boil an egg?")


def picture_of(folder: Path) -> bytes:
    """A PNG: how strongly each layer is edited, and where in the row.

    Raises:
        ReftuneError: a folder that holds no adapter, or a damaged one.
    """
    from reftune.adapter.info import read_adapter_info
    from reftune.output.pictures import new_figure

    found = read_adapter_info(folder)
    layers = [edit.block if edit.layer is None else str(edit.layer) for edit in found.edits]
    linear = [edit.linear_norm or sum(edit.norms.values()) for edit in found.edits]
    constant = [edit.constant_norm or 0.0 for edit in found.edits]
    places = range(len(layers))
    figure, axes = new_figure((7, 3), grid=True)
    axes.bar(
        [place - 0.2 for place in places], linear, width=0.4, color="#2563eb", label="|M|: what depends on the state"
    )
    axes.bar([place + 0.2 for place in places], constant, width=0.4, color="#c2410c", label="|c|: what is always added")
    axes.set_xticks(list(places), layers, fontsize=8 if len(layers) < 20 else 6)
    axes.set_xlabel("layer")
    axes.set_ylabel("norm of the edit")
    axes.set_title(f"{found.config.method}, rank {found.config.r}, at {found.config.positions}", fontsize=10)
    axes.margins(y=0.25)  # room for the legend
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="upper right")
    image = io.BytesIO()
    figure.savefig(image, format="png", transparent=True)  # the page's own background, light or dark
    return image.getvalue()


def explanation_of(model: str, folder: Path, device: str | None) -> dict[str, Any]:
    """The words of `reftune.causal.explain`, and for each layer how far the answer moves without its edit (nats)."""
    from reftune.causal.explain import explain
    from reftune.data.templates import render_prompt
    from reftune.inference.loading import load_edited

    edited = load_edited(folder, model=model, device=device)
    encoding = edited.encoding
    prompts = [render_prompt(text, edited.tokenizer, encoding.template, encoding.system_prompt) for text in PROMPTS]
    found = explain(edited.model, edited.tokenizer, prompts)
    removal = [{"layer": site.layer, "path": site.path, "nats": site.removal} for site in found.sites]
    return {"text": found.text(), "effect": found.effect, "removal": removal, "prompts": list(PROMPTS)}


if __name__ == "__main__":
    print(json.dumps(explanation_of(sys.argv[1], Path(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else None)))
