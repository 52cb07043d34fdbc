"""pyreft's trainers: its arguments, what they train, what they save, and resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM, TrainingArguments

import reftune.pyreft as pyreft
from reftune.errors import ReftuneError
from tests.cli.tiny_folder import tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch")
TOKENIZER = tiny_tokenizer()
SIZES: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def _llama() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(TOKENIZER), max_position_embeddings=64, **SIZES))


def _config(**more: Any) -> pyreft.ReftConfig:
    torch.manual_seed(1)
    edit = pyreft.LoreftIntervention(embed_dim=16, low_rank_dimension=2, **more)
    return pyreft.ReftConfig({"layer": 1, "component": "block_output", "intervention": edit})


def _arguments(folder: Path, **more: Any) -> TrainingArguments:
    options: dict[str, Any] = {"per_device_train_batch_size": 2, "learning_rate": 1e-2, "report_to": [], "seed": 3}
    return TrainingArguments(output_dir=str(folder), logging_steps=1, **{**options, **more})


def _data(positions: str = "l1") -> dict[str, Any]:
    return pyreft.make_multiple_position_supervised_data_module(
        TOKENIZER, None, ["ab", "cdef", "g", "hij"], ["x", "yy", "z", "xy"], positions, share_weights=True
    )


@pytest.mark.parametrize("name", ["tokenizer", "processing_class"])
def test_training_lowers_the_loss_and_leaves_the_model_alone(name: str, tmp_path: Path) -> None:
    model = pyreft.get_reft_model(_llama(), _config())
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    arguments = _arguments(tmp_path, num_train_epochs=15, save_strategy="no")
    trainer = pyreft.ReftTrainerForCausalLM(model=model, args=arguments, **{name: TOKENIZER}, **_data())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)


def test_the_trainer_edits_where_the_locations_say(tmp_path: Path) -> None:
    """One step of the trainer is one step by hand."""
    found = []
    data = _data("f1+l2")
    model = pyreft.get_reft_model(_llama(), _config())
    pyreft.ReftTrainerForCausalLM(
        model=model,
        args=_arguments(tmp_path, max_steps=1, per_device_train_batch_size=4, save_strategy="no", optim="sgd"),
        tokenizer=TOKENIZER,
        **data,
    ).train()
    found.append([p.detach() for p in model.parameters() if p.requires_grad])

    model = pyreft.get_reft_model(_llama(), _config()).train()
    batch = data["data_collator"](list(data["train_dataset"]))
    locations, labels = batch.pop("intervention_locations"), batch.pop("labels")
    model(batch, unit_locations={"base": locations.transpose(0, 1).tolist()}, labels=labels)[1].loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    torch.optim.SGD(trained, lr=1e-2).step()
    found.append([p.detach() for p in trained])
    for ours, by_hand in zip(*found, strict=True):
        torch.testing.assert_close(ours, by_hand, rtol=1e-4, atol=1e-6)


def test_the_positions_of_the_data_are_saved_with_the_adapter(tmp_path: Path) -> None:
    model = pyreft.get_reft_model(_llama(), _config())
    trainer = pyreft.ReftTrainerForCausalLM(
        model=model, args=_arguments(tmp_path), tokenizer=TOKENIZER, **_data("f1+l2")
    )
    trainer.save_model(str(tmp_path / "out"))
    again = pyreft.ReftModel.load(tmp_path / "out", _llama())
    assert again.reft_config.positions == "f1+l2"
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_a_checkpoint_holds_the_edits_alone_and_training_resumes_from_it(tmp_path: Path) -> None:
    def run(folder: Path, steps: int, resume: bool = False) -> Any:
        model = pyreft.get_reft_model(_llama(), _config())
        arguments = _arguments(
            folder, max_steps=steps, save_strategy="steps", save_steps=3, lr_scheduler_type="constant"
        )
        trainer = pyreft.ReftTrainerForCausalLM(model=model, args=arguments, tokenizer=TOKENIZER, **_data())
        trainer.train(resume_from_checkpoint=True if resume else None)
        return model

    whole = run(tmp_path / "whole", 6)
    run(tmp_path / "broken", 3)
    file = tmp_path / "broken" / "checkpoint-3" / "model.safetensors"
    assert file.stat().st_size < 2000
    resumed = run(tmp_path / "broken", 6, resume=True)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_classifiers_head_trains_and_is_saved_with_the_edit(tmp_path: Path) -> None:
    def base() -> Any:
        torch.manual_seed(0)
        config = BertConfig(vocab_size=len(TOKENIZER), max_position_embeddings=64, pad_token_id=0, **SIZES)
        return BertForSequenceClassification(config)

    rows = [{"t": text, "y": n % 2} for n, text in enumerate(["ab", "xyz", "abc", "xz"])]
    data = pyreft.ReftClassificationDataset(
        "x", None, TOKENIZER, dataset=rows, input_field="t", label_field="y", position="f1"
    )
    model: Any = pyreft.get_reft_model(base(), _config())
    for parameter in model.model.classifier.parameters():
        parameter.requires_grad = True
    from transformers import DataCollatorWithPadding

    trainer = pyreft.ReftTrainerForSequenceClassification(
        model=model, args=_arguments(tmp_path, max_steps=4, save_strategy="no"), tokenizer=TOKENIZER,
        train_dataset=data, data_collator=pyreft.ReftDataCollator(DataCollatorWithPadding(TOKENIZER)),
    )  # fmt: skip
    trainer.train()
    model.eval()
    model.save(tmp_path / "out")
    again = pyreft.ReftModel.load(tmp_path / "out", base()).eval()
    inputs = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    expected = model(inputs, unit_locations={"base": 0})[1].logits
    assert torch.equal(again(inputs, unit_locations={"base": 0})[1].logits, expected)
    assert not torch.equal(base().classifier.weight, model.model.classifier.weight)
    from peft import PeftModel

    through_peft = PeftModel.from_pretrained(base(), str(tmp_path / "out")).eval()
    mask = torch.tensor([[True, False, False]])
    assert torch.equal(through_peft(**inputs, intervention_mask=mask).logits, expected)


def test_an_optimiser_that_is_not_there_is_replaced_and_said(tmp_path: Path, caplog: Any) -> None:
    arguments = _arguments(tmp_path, optim="paged_adamw_32bit")
    model = pyreft.get_reft_model(_llama(), _config())
    trainer = pyreft.ReftTrainerForCausalLM(model=model, args=arguments, tokenizer=TOKENIZER, **_data())
    if not torch.cuda.is_available():
        assert str(getattr(trainer.args.optim, "value", trainer.args.optim)) == "adamw_torch"
        assert "'paged_adamw_32bit' needs bitsandbytes and a CUDA GPU" in caplog.text


def test_a_model_without_the_facade_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ReftuneError, match="model is a LlamaForCausalLM: pass what get_reft_model returned"):
        pyreft.ReftTrainerForCausalLM(model=_llama(), args=_arguments(tmp_path), tokenizer=TOKENIZER, **_data())
