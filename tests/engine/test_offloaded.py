"""A base that accelerate keeps on disk or in memory: edits run where its blocks run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from peft import get_peft_model
from safetensors.torch import load_file

import reftune
from reftune.errors import ReftuneError
from tests.tiny_models import TINY, tiny_inputs
from tests.training.toy_rows import trainer


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


def _life(base: Any, folder: Path, component: str) -> dict[str, Any]:
    """A greedy answer, three steps of training and what is saved."""
    torch.manual_seed(1)
    config = reftune.ReftConfig(
        r=2, init="paper", component=component, positions="l2+generated", layers_to_transform=[1], task_type="CAUSAL_LM"
    )
    model = get_peft_model(base, config).eval()
    ids = torch.arange(3, 17).view(2, 7)
    answer = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    with model.disable_adapter():
        plain = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    run = trainer(folder / "run", model, max_steps=3, learning_rate=1e-2)
    run.train()
    run.save_model(str(folder / "saved"))
    return {
        "answer": answer,
        "plain": plain,
        "losses": torch.tensor([entry["loss"] for entry in run.state.log_history if "loss" in entry]),
        "eval_loss": torch.tensor(run.evaluate()["eval_loss"]),
        "hits": torch.tensor(run.prefixes.summary()["hits"]),
        **load_file(folder / "saved" / "adapter_model.safetensors"),
    }


@pytest.mark.parametrize("component", ["block_output", "head_output[1]"])
@pytest.mark.filterwarnings("ignore:Some parameters are on the meta device")
@pytest.mark.filterwarnings("ignore:You are calling .generate")  # earlier transformers take the disk for the device
def test_a_base_kept_on_disk_answers_trains_and_saves_to_the_bit(component: str, tmp_path: Path) -> None:
    expected = _life(TINY["llama"](), tmp_path / "plain", component)
    found = _life(_kept_elsewhere("device_map", tmp_path / "disk"), tmp_path / "offloaded", component)
    assert found.keys() == expected.keys() and found["hits"] > 0  # prefix reuse is on
    assert not torch.equal(found["answer"], found["plain"])
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_trainer_says_what_to_do_with_weights_offloaded_without_a_device_map(tmp_path: Path) -> None:
    model = get_peft_model(_kept_elsewhere("cpu_offload", tmp_path), reftune.ReftConfig(task_type="CAUSAL_LM"))
    with pytest.raises(ReftuneError, match="load it with device_map"):
        trainer(tmp_path, model)
