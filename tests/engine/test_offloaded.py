"""A base that accelerate keeps on disk or in memory: edits run where its blocks run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from peft import get_peft_model

import reftune
from tests.tiny_models import TINY, tiny_inputs


def _kept_elsewhere(how: str, folder: Path) -> Any:
    """The tiny Llama with its blocks on disk or in memory, brought to the device only while they run."""
    model = TINY["llama"]()
    if how == "cpu_offload":
        return cpu_offload(model, execution_device=torch.device("cpu"))
    if how == "disk_offload":
        disk_offload(model, str(folder), execution_device=torch.device("cpu"))
        return model
    places: dict[str, Any] = dict.fromkeys(
        ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.0"), "cpu"
    )
    places |= {"model.layers.1": "disk", "model.layers.2": "disk"}
    return dispatch_model(
        model, device_map=places, offload_dir=str(folder), main_device=torch.device("cpu"), force_hooks=True
    )


@pytest.mark.parametrize("kind", ["attach", "peft"])
@pytest.mark.parametrize("how", ["device_map", "cpu_offload", "disk_offload"])
def test_edits_of_blocks_kept_on_disk_run_where_the_blocks_do(how: str, kind: str, tmp_path: Path) -> None:
    config: dict[str, Any] = {"r": 2, "init": "paper", "component": "mlp_output", "positions": "l1"}

    def edited(model: Any) -> tuple[Any, list[torch.nn.Parameter]]:
        torch.manual_seed(1)
        if kind == "attach":
            return model, list(reftune.attach(model, **config).parameters())
        tuned = get_peft_model(model, reftune.ReftConfig(**config)).eval()
        return tuned, [p for p in tuned.parameters() if p.requires_grad]

    inputs = tiny_inputs("llama")
    labels = {"labels": inputs["input_ids"].masked_fill(torch.arange(7) < 3, -100)}
    (plain, expected), (model, edits) = edited(TINY["llama"]()), edited(_kept_elsewhere(how, tmp_path))
    assert any(p.is_meta for p in model.parameters()) and not any(p.is_meta for p in edits)
    for one in (plain, model):
        one(**inputs, **labels).loss.backward()
    for ours, theirs in zip(edits, expected, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, plain(**inputs).logits)
        inner = model if kind == "attach" else model.get_base_model()
        torch.testing.assert_close(inner.forward(**inputs).logits, plain(**inputs).logits)
