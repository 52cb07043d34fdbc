"""One batch, an adapter for each row: edits and saved modules, and names that do not fit."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor

import reftune
from tests.tiny_models import TINY, tiny_inputs

HEADS = {"llama": "lm_head", "bert": "classifier", "roberta": "classifier", "vit": "classifier", "bart": "lm_head"}
NAMES = ["b", "__base__", "a", "b", "plain"]


def mixed_model(name: str, task: str | None = None) -> Any:
    """Adapters a and b with a head of their own, and one without; all moved off their start."""
    config: dict[str, Any] = {
        "r": 2,
        "layers_to_transform": [0],
        "positions": "all",
        "init": "paper",
        "task_type": task,
    }
    component: dict[str, Any] = {"component": "encoder.block_output"} if name == "bart" else {}
    model: Any = TINY[name]()
    for adapter, saved in (("a", [HEADS[name]]), ("b", [HEADS[name]]), ("plain", None)):
        one = reftune.ReftConfig(**config, **component, modules_to_save=saved)
        if adapter == "a":
            model = get_peft_model(model, one, adapter)
        else:
            model.add_adapter(adapter, one)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if ".modules_to_save." in path:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def one_by_one(model: Any, names: list[str], inputs: dict[str, Tensor]) -> Tensor:
    """The reference: each row by itself, with its adapter as the active one."""
    rows = []
    for row, name in enumerate(names):
        own = {key: value[row : row + 1] for key, value in inputs.items()}
        if name == "__base__":
            with model.disable_adapter():
                rows.append(model(**own).logits)
        else:
            model.set_adapter(name)
            rows.append(model(**own).logits)
    return torch.cat(rows)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("active", ["a", "plain"])
@pytest.mark.parametrize("name", HEADS)
@torch.no_grad()
def test_each_row_has_its_adapters_edit_and_head(name: str, active: str):
    model, inputs = mixed_model(name), tiny_inputs(name, batch=len(NAMES))
    expected = one_by_one(model, NAMES, inputs)
    model.set_adapter(active)
    before = model(**inputs).logits
    torch.testing.assert_close(model(**inputs, adapter_names=NAMES).logits, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(model(**inputs).logits, before)
    assert (expected[0] - expected[1]).abs().max() > 0.1


@pytest.mark.parametrize("beams", [1, 2])
@torch.no_grad()
def test_generate_takes_each_rows_head_with_beams_too(beams: int):
    model, inputs = mixed_model("llama", "CAUSAL_LM"), tiny_inputs("llama", batch=3)
    options: Any = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "num_beams": beams}
    names = ["b", "__base__", "plain"]
    together = model.generate(**inputs, **options, adapter_names=names)
    for row, name in enumerate(names):
        own = {key: value[row : row + 1] for key, value in inputs.items()}
        model.set_adapter("a" if name == "__base__" else name)
        if name == "__base__":
            with model.disable_adapter():
                alone = model.generate(**own, **options)
        else:
            alone = model.generate(**own, **options)
        assert torch.equal(together[row], alone[0])


@torch.no_grad()
def test_a_mixed_batch_in_one_thread_leaves_another_threads_heads_alone():
    model, inputs = mixed_model("llama"), tiny_inputs("llama")
    model.set_adapter("a")
    expected = model(**inputs).logits
    found: list[Tensor] = []

    def elsewhere(*_: Any) -> None:
        if not found:
            found.append(torch.empty(0))
            thread = threading.Thread(target=lambda: found.append(plain(**inputs).logits))
            thread.start()
            thread.join()

    plain = model.get_base_model()
    with torch.no_grad():
        handle = plain.model.norm.register_forward_hook(elsewhere)
        model(**inputs, adapter_names=["b", "__base__"])
        handle.remove()
    assert torch.equal(found[1], expected)


@torch.no_grad()
def test_each_row_has_its_adapters_trained_tokens():
    inputs = tiny_inputs("llama", batch=4)
    config: dict[str, Any] = {"r": 2, "layers_to_transform": [0], "positions": "all"}
    tokens = inputs["input_ids"][:, 2].tolist()
    model: Any = get_peft_model(TINY["llama"](), reftune.ReftConfig(**config, trainable_token_indices=tokens), "a")
    model.add_adapter("b", reftune.ReftConfig(**config, trainable_token_indices=tokens[1:]))
    model.add_adapter("plain", reftune.ReftConfig(**config))
    for path, parameter in model.named_parameters():
        if "trainable_tokens_delta" in path:
            parameter += 1.0 if path.endswith("a") else 2.0
    names = ["a", "b", "__base__", "plain"]
    expected = one_by_one(model.eval(), names, inputs)
    model.set_adapter("a")
    torch.testing.assert_close(model(**inputs, adapter_names=names).logits, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model(**inputs).logits[1:], expected[1:], atol=1e-2)


CALLS: dict[str, Any] = {
    "keyword": lambda model, ids, **k: model(input_ids=ids, **k),
    "positional": lambda model, ids, **k: model(ids, **k),
    "embeddings": lambda model, ids, **k: model(inputs_embeds=model.get_input_embeddings()(ids), **k),
    "generate": lambda model, ids, **k: model.generate(input_ids=ids, max_new_tokens=2, **k),
    "generate positional": lambda model, ids, **k: model.generate(ids, max_new_tokens=2, **k),
}


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["a", "b"], "2 names for 4 rows"),
        (["__base__"], "1 names for 4 rows"),
        (["a"] * 5, "5 names for 4 rows"),
        ([], "0 names for 4 rows"),
        (["a", "b", "a", "nobody"], "nobody"),
        ("a", "give a list"),
    ],
)
@pytest.mark.parametrize("call", CALLS)
def test_names_that_do_not_fit_are_refused_by_every_kind_of_call(call: str, names: Any, words: str):
    task = None if call == "positional" else "CAUSAL_LM"
    model, ids = mixed_model("llama", task), tiny_inputs("llama", batch=4)["input_ids"]
    before = model(input_ids=ids).logits
    with pytest.raises(reftune.ReftuneError, match=words):
        CALLS[call](model, ids, adapter_names=names)
    assert torch.equal(model(input_ids=ids).logits, before)


@pytest.mark.parametrize("call", CALLS)
@torch.no_grad()
def test_names_for_every_row_are_taken_by_every_kind_of_call(call: str):
    model, ids = mixed_model("llama"), tiny_inputs("llama", batch=2)["input_ids"]
    out = CALLS[call](model, ids, adapter_names=["a", "b"])
    assert len(out if isinstance(out, Tensor) else out.logits) == 2


def test_images_take_a_name_for_every_row():
    model, inputs = mixed_model("vit"), tiny_inputs("vit", batch=4)
    with pytest.raises(reftune.ReftuneError, match="2 names for 4 rows"):
        model(**inputs, adapter_names=["a", "b"])


def test_continuous_batching_refuses_rows_with_heads_of_their_own():
    model = mixed_model("llama")
    with pytest.raises(reftune.ReftuneError, match="lm_head.*modules_to_save"):
        model.generate_batch([[5, 6], [7, 8]], adapter_names=["a", "b"])


def test_names_that_reach_a_model_of_add_adapter_are_refused():
    model: Any = TINY["llama"]()
    model.add_adapter(reftune.ReftConfig(r=2, layers_to_transform=[1]), adapter_name="a")
    inputs = tiny_inputs("llama")
    names = ["a"] * len(inputs["input_ids"])
    with pytest.raises(reftune.ReftuneError, match="adapter_names: .*PeftModel"):
        model(**inputs, adapter_names=names)
    assert model(**inputs).logits.isfinite().all()
