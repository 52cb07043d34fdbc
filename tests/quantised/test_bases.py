"""Bases that stay quantised, on a CPU: nf4 and int8 of bitsandbytes, int8 of torchao and of quanto (`make test-quantised`).

The reference is the same base in float32: a layer's weight is what it makes of the identity matrix in training mode.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from typer.testing import CliRunner

import reftune
from reftune.cli.app import app
from reftune.data.collating import CompletionCollator
from reftune.inference.loading import load_edited
from tests.cli.tiny_folder import save_tiny_model, write_rows

COMPONENTS = ("block_output", "mlp_output", "attention_output")
PACKAGES = {"nf4": "bitsandbytes", "int8": "bitsandbytes", "torchao": "torchao", "quanto": "optimum.quanto"}
KINDS = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            find_spec(package.partition(".")[0]) is None, reason=f"{package} is missing: make test-quantised"
        ),
    )
    for name, package in PACKAGES.items()
]
pytestmark = pytest.mark.filterwarnings("ignore")


def _torchao() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig  # pyright: ignore[reportMissingImports]

    return tf.TorchAoConfig(Int8WeightOnlyConfig())


QUANTISED: dict[str, Callable[[], Any]] = {
    "nf4": lambda: tf.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    ),
    "int8": lambda: tf.BitsAndBytesConfig(load_in_8bit=True),
    "torchao": _torchao,
    "quanto": lambda: tf.QuantoConfig(weights="int8"),
}


def unquantised() -> Any:
    """Widths of whole 64s, as every published model has: bitsandbytes keeps a scale for each 64 numbers."""
    torch.manual_seed(0)
    return tf.LlamaForCausalLM(
        tf.LlamaConfig(
            vocab_size=97, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2, pad_token_id=0, eos_token_id=2,
        )
    ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("base")
    unquantised().save_pretrained(place)
    return place


def base_of(kind: str, folder: Path) -> Any:
    return tf.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=QUANTISED[kind](), device_map={"": "cpu"}, dtype=torch.float32
    ).eval()


def in_float32(quantised: Any) -> Any:
    """The unquantised model with the weights that the quantised layers hold."""
    plain = unquantised()
    for name, layer in quantised.train().named_modules():
        if isinstance(layer, nn.Linear) and name != "lm_head":
            own = plain.get_submodule(name)
            with torch.no_grad():
                own.weight.copy_(layer(torch.eye(own.in_features)).T)
    return plain


def edited(base: Any, component: str) -> Any:
    torch.manual_seed(0)
    return get_peft_model(
        base,
        reftune.ReftConfig(
            method="direft", r=2, layers_to_transform="all", component=component, positions="l1+generated", init="paper",
            task_type="CAUSAL_LM",
        ),
    )  # fmt: skip


def rows() -> dict[str, Tensor]:
    ids = torch.randint(3, 90, (3, 9), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": torch.cat([torch.full((3, 4), -100), ids[:, 4:]], 1)}


def learned(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, and the gradient of each parameter of the edits."""
    model.train().zero_grad()
    loss = model(**rows()).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(input_ids=rows()["input_ids"]).logits


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_the_weights_it_holds_before_and_after_an_evaluation(
    kind: str, component: str, folder: Path
) -> None:
    model = edited(base_of(kind, folder), component)
    loss, expected = learned(edited(in_float32(base_of(kind, folder)), component))
    assert len(expected) == 9
    for _ in range(2):
        torch.testing.assert_close(learned(model), (loss, expected), rtol=1e-4, atol=1e-5)
        logits(model)
    assert (learned(edited(unquantised(), component))[0] - loss).abs() > 1e-4, "quantising changes something"


@pytest.mark.parametrize("kind", KINDS)
def test_a_base_that_has_written_before_is_trained_on_or_refused_and_is_itself_again(kind: str, folder: Path) -> None:
    """bitsandbytes packs 4-bit weights at the first evaluation, where the CPU has AVX512-BF16: no gradient passes then."""
    used = base_of(kind, folder)
    before = logits(used)
    if any(getattr(getattr(m.weight, "quant_state", None), "packing_format_for_cpu", False) for m in linears(used)):
        with pytest.raises(reftune.ReftuneError, match="packed for inference.*load the base again"):
            edited(used, "block_output")
        with pytest.raises(reftune.ReftuneError, match="packed for inference"):
            reftune.attach(used, method="direft", layers_to_transform=[0])
    else:
        model = edited(used, "block_output")
        expected = learned(edited(base_of(kind, folder), "block_output"))
        torch.testing.assert_close(learned(model), expected, rtol=1e-5, atol=1e-6)
        used = model.unload()
    assert torch.equal(logits(used), before)


def linears(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("kind", KINDS)
def test_an_edit_is_trained_saved_and_comes_back_the_same(
    kind: str, component: str, folder: Path, tmp_path: Path
) -> None:
    model = edited(base_of(kind, folder), component)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    first = learned(model)[0]
    loss = first
    for _ in range(5):
        optimiser.step()
        loss = learned(model)[0]
    assert loss < first - 0.01
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base_of(kind, folder), tmp_path)
    assert torch.equal(logits(again), logits(model))
    prompt = {"input_ids": rows()["input_ids"], "attention_mask": torch.ones(3, 9, dtype=torch.long)}
    written = [one.generate(**prompt, max_new_tokens=4, do_sample=False) for one in (model, again)]
    assert torch.equal(*written)
    assert not torch.equal(logits(model), logits(base_of(kind, folder)))
    assert torch.equal(logits(again.unload()), logits(base_of(kind, folder)))


@pytest.mark.parametrize("kind", KINDS)
def test_the_trainer_learns_on_it_and_reuses_prefixes_where_that_is_exact(
    kind: str, folder: Path, tmp_path: Path
) -> None:
    trained = [
        {"input_ids": row[:9].tolist(), "labels": label.tolist(), "prompt_length": 4}
        for row, label in zip(*rows().values(), strict=True)
    ]
    trainer = reftune.ReftTrainer(
        model=edited(base_of(kind, folder), "block_output"),
        args=reftune.ReftTrainingArguments(
            output_dir=str(tmp_path), num_train_epochs=6, per_device_train_batch_size=3, learning_rate=0.02, logging_steps=1,
            report_to="none", use_cpu=True, dataloader_pin_memory=False, save_strategy="no", eval_strategy="epoch",
        ),
        train_dataset=trained,
        eval_dataset=trained,
        data_collator=CompletionCollator(0),
    )  # fmt: skip
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert losses[-1] < losses[0] - 0.01
    # int8 of bitsandbytes rounds a batch's activations together in evaluation, which the proof on the first batch finds.
    assert trainer.report()["prefix_reuse"].startswith("off: its logits differ" if kind == "int8" else "on")


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is missing: make test-quantised")
@pytest.mark.parametrize(("bits", "layer"), [("4bit", "Linear4bit"), ("8bit", "Linear8bitLt")])
def test_the_command_trains_and_the_adapter_finds_its_quantised_base(bits: str, layer: str, tmp_path: Path) -> None:
    tiny = str(save_tiny_model(tmp_path / "tiny", hidden=64))
    file, out = str(write_rows(tmp_path / "rows.csv")), str(tmp_path / "out")
    flags = (
        f"train --model {tiny} --train-file {file} --quantization {bits} --device cpu --no-tensorboard --output {out}"
    )
    done = CliRunner().invoke(app, [*flags.split(), "--eval-fraction", "0.25", "--lr", "0.01"])
    assert done.exit_code == 0, done.output
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["eval_loss"] > 0 and metrics["prefix_reuse"]
    written = CliRunner().invoke(
        app, ["generate", out, "--prompt", "say 3", "--max-new-tokens", "3", "--device", "cpu"]
    )
    assert written.exit_code == 0, written.output
    assert sum(type(part).__name__ == layer for part in load_edited(out, device="cpu").model.modules()) == 14
