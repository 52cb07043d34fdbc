"""The trainer: same losses as the plain one, adapters in checkpoints, gradients where they are wanted."""

import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import TrainerCallback

from reftune import ReftConfig
from reftune.engine.transformers_names import checkpointing_arguments, checkpoints_activations
from reftune.training.prompt_ends import with_prompt_ends
from tests.tiny_models import TINY
from tests.training.toy_rows import batch, history, lora_model, reft_model, rows, trainer, weights


class KeepGradients(TrainerCallback):
    """Copies the gradients of the second step."""

    def __init__(self) -> None:
        self.seen: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == 1:
            self.seen = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def losses(run: Any, name: str = "loss") -> list[float]:
    return [entry[name] for entry in history(run) if name in entry]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("steps", [1, 2])
def test_supervised_logits_train_as_all_logits_do(tmp_path: Path, smoothing: float, steps: int) -> None:
    runs = []
    for only in (True, False):
        run = trainer(
            tmp_path,
            reft_model(),
            supervised_logits_only=only,
            label_smoothing_factor=smoothing,
            gradient_accumulation_steps=steps,
            eval_strategy="epoch",
        )
        run.train()
        runs.append(run)
    for name in ("loss", "grad_norm", "eval_loss"):
        assert losses(runs[0], name) == pytest.approx(losses(runs[1], name), rel=1e-5, abs=1e-6)
        assert losses(runs[0], name)


def test_accumulated_steps_equal_one_large_batch(tmp_path: Path) -> None:
    runs = []
    for size, steps in ((4, 1), (2, 2), (1, 4)):
        run = trainer(tmp_path, reft_model(), per_device_train_batch_size=size, gradient_accumulation_steps=steps)
        run.train()
        runs.append(run)
    for other in runs[1:]:
        assert losses(other) == pytest.approx(losses(runs[0]), rel=1e-5)
        for name, weight in weights(runs[0].model).items():
            torch.testing.assert_close(weights(other.model)[name], weight, rtol=1e-4, atol=1e-6)


def test_a_checkpoint_holds_the_adapter_alone(tmp_path: Path) -> None:
    run = trainer(tmp_path, save_strategy="epoch")
    run.train()
    checkpoint = tmp_path / "checkpoint-10"
    assert [file.name for file in checkpoint.glob("*.safetensors")] == ["adapter_model.safetensors"]
    assert not [file for file in checkpoint.iterdir() if file.suffix == ".bin" and file.name != "training_args.bin"]
    loaded = PeftModel.from_pretrained(TINY["llama"](), checkpoint)
    inputs = batch()
    run.model.eval()
    assert torch.equal(loaded(**inputs).logits, run.model(**inputs).logits)


def test_the_best_checkpoint_is_kept_and_loaded(tmp_path: Path) -> None:
    class Spoil(TrainerCallback):
        def on_epoch_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.epoch == 2:
                with torch.no_grad():
                    for parameter in model.parameters():
                        if parameter.requires_grad:
                            parameter.add_(3.0)

    run = trainer(
        tmp_path,
        callbacks=[Spoil()],
        num_train_epochs=4,
        save_strategy="epoch",
        eval_strategy="epoch",
        load_best_model_at_end=True,
        save_total_limit=1,
    )
    run.train()
    evaluated = losses(run, "eval_loss")
    best = evaluated.index(min(evaluated)) + 1
    assert best <= 2, "the spoilt epochs must be worse, else this test shows nothing"
    assert run.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{5 * best}")
    assert run.evaluate()["eval_loss"] == pytest.approx(min(evaluated), rel=1e-6)
    assert run.report()["eval_loss"] == pytest.approx(min(evaluated), rel=1e-6)


def _lora_beside(where: str) -> Any:
    """A ReFT adapter beside a LoRA one, under two names."""
    lora = lora_model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = ReftConfig(r=2, layers_to_transform=[1], task_type="CAUSAL_LM")
        return get_peft_model(lora.get_base_model(), config, adapter_name=where)


def _by_transformers() -> Any:
    model: Any = TINY["llama"]()
    model.requires_grad_(False)
    model.add_adapter(ReftConfig(r=2, layers_to_transform=[1]), adapter_name="edit")
    return model


def _named() -> Any:
    config = ReftConfig(r=2, layers_to_transform=[1], task_type="CAUSAL_LM", modules_to_save=["lm_head"])
    return get_peft_model(TINY["llama"](), config, adapter_name="edit")


class Worsen(TrainerCallback):
    """Spoils what trains after the second step, so that the best checkpoint is the first."""

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step >= 2:
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.add_(3.0)


@pytest.mark.parametrize("make", [_named, lambda: _lora_beside("edit"), _by_transformers])
def test_the_best_checkpoint_is_loaded_whatever_the_adapters_are_called(tmp_path: Path, make: Any) -> None:
    run = trainer(
        tmp_path,
        make(),
        callbacks=[Worsen()],
        num_train_epochs=1,
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
    )
    run.train()
    evaluated = losses(run, "eval_loss")
    assert run.state.best_global_step == 2 and evaluated[1] > 1.05 * evaluated[0]
    assert run.report()["eval_loss"] == evaluated[0]
    assert run.evaluate()["eval_loss"] == pytest.approx(evaluated[0], rel=1e-6)


def test_the_report_of_a_broken_off_run_is_of_the_model_as_it_is(tmp_path: Path) -> None:
    class BreakOff(Worsen):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 5:
                raise RuntimeError("stop")

    steps = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    run = trainer(tmp_path, callbacks=[BreakOff()], load_best_model_at_end=True, **steps)
    with pytest.raises(RuntimeError, match="stop"):
        run.train()
    evaluated = losses(run, "eval_loss")
    assert len(evaluated) == 2 and evaluated[1] > evaluated[0]
    assert run.report()["eval_loss"] == evaluated[1]


def test_metrics_get_the_logits_of_every_position(tmp_path: Path) -> None:
    shapes = []

    def metrics(prediction: Any) -> dict[str, float]:
        shapes.append((prediction.predictions.shape[:2], prediction.label_ids.shape))
        return {"count": 1.0}

    run = trainer(tmp_path)
    expected = run.evaluate()["eval_loss"]
    run.compute_metrics = metrics
    found = run.evaluate()
    assert shapes and shapes[0][0] == shapes[0][1]
    assert found["eval_loss"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("make", [lora_model, reft_model])
def test_checkpointed_activations_give_the_same_gradients(tmp_path: Path, make: Any) -> None:
    found = []
    for checkpointing in (False, True):
        run = trainer(
            tmp_path,
            make(),
            prefix_reuse="off",  # checkpointing switches it off: only that is to differ
            **checkpointing_arguments(checkpointing, {"use_reentrant": False} if checkpointing else None),
        )
        keep = KeepGradients()
        run.add_callback(keep)
        run.train()
        assert checkpoints_activations(run.model.base_model.model) == checkpointing
        found.append(keep.seen)
    assert found[0].keys() == found[1].keys() and found[0]
    for name, gradient in found[0].items():
        assert gradient.abs().max() > 0 or "lora_A" in name
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-6, atol=1e-8)


def test_nothing_below_the_edited_layer_runs_backward(tmp_path: Path) -> None:
    needed, above = [], []
    run = trainer(tmp_path, **checkpointing_arguments(True, {"use_reentrant": False}))
    embeddings = run.model.get_input_embeddings()
    layers = run.model.base_model.model.model.layers
    for below in (embeddings, layers[0]):
        below.register_forward_hook(lambda module, args, output: needed.append(output.requires_grad))
    layers[1].register_forward_hook(lambda module, args, output: above.append(output.requires_grad))
    run.train()
    assert needed and not any(needed)
    assert all(above)


def test_a_model_without_a_head_takes_the_plain_path_and_says_so_once(tmp_path: Path, caplog: Any) -> None:
    run = trainer(tmp_path, TINY["llama"]())
    run.model.get_output_embeddings = lambda: None
    with caplog.at_level(logging.WARNING, "reftune.training.trainer"):
        run.train()
    said = [record.message for record in caplog.records if "every position" in record.message]
    assert len(said) == 1 and "has no output embeddings" in said[0]
    assert losses(run)


def test_a_model_without_edits_gets_no_prompt_lengths(tmp_path: Path) -> None:
    inputs = with_prompt_ends(lora_model(), {**batch(), "prompt_lengths": torch.tensor([1, 2, 3])})
    assert "prompt_lengths" not in inputs


def test_the_report_says_what_training_came_to(tmp_path: Path) -> None:
    run = trainer(tmp_path, num_train_epochs=3, eval_strategy="epoch")
    run.train()
    report = run.report()
    assert report["train_loss"] == pytest.approx(sum(losses(run)) / 15, rel=1e-4)
    assert report["eval_loss"] == losses(run, "eval_loss")[-1]
    assert len(report["epoch_seconds"]) == 3 and min(report["epoch_seconds"]) > 0
    assert report["tokens"] == 3 * sum(len(row["input_ids"]) for row in rows(10))
    assert report["tokens_per_second"] == pytest.approx(report["tokens"] / sum(report["epoch_seconds"]))
    assert report["trainable_parameters"] == sum(w.numel() for w in weights(run.model).values())
    assert report["peak_memory_bytes"] > 1 << 20
    assert report["prefix_reuse"] == "on" and report["prefix_store"]["entries"] > 0


def test_the_default_collator_pads_with_the_tokenizer_s_token_on_the_right(tmp_path: Path) -> None:
    from types import SimpleNamespace

    from reftune.training.arguments import ReftTrainingArguments
    from reftune.training.trainer import ReftTrainer

    tokenizer: Any = SimpleNamespace(pad_token_id=5, padding_side="left")
    run = ReftTrainer(
        model=lora_model(),
        args=ReftTrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True),
        processing_class=tokenizer,
    )
    padded = run.data_collator([{"input_ids": [8], "labels": [8]}, {"input_ids": [8, 9], "labels": [-100, 9]}])
    assert padded["input_ids"][0].tolist() == [8, 5]


def test_rows_without_tokens_cannot_be_grouped_by_length(tmp_path: Path) -> None:
    from reftune.errors import ReftuneError

    run = trainer(tmp_path, train=[{"text": "a"}] * 4)
    with pytest.raises(ReftuneError, match="group_by_length"):
        run.train()
