"""ReFT inside transformers: gradients under checkpointing, Trainer, pipeline, compile, device maps."""

from __future__ import annotations

import warnings

import pytest
import torch
from accelerate import dispatch_model
from peft import get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments

import reftune
from reftune.engine.transformers_names import enable_checkpointing
from tests.tiny_models import CAUSAL, ENCODER_DECODERS, ENCODERS, TINY, tiny_inputs

MIXTURES = ("mixtral", "qwen3_moe", "gpt_oss")  # torch's grouped matrix product has no float64
IN_FLOAT32 = (*MIXTURES, "gptj")  # GPT-J's attention computes in float32 whatever the model's dtype
COMPONENTS = [
    "block_output", "block_input", "mlp_output", "mlp_input", "attention_output", "attention_input", "query_output",
    "head_output[1]",
]  # fmt: skip


def prepared(name: str = "llama", **changes) -> nn.Module:
    settings = {"r": 2, "positions": "f1+l2", "init": "paper", "task_type": None}
    model = TINY[name]()
    if name not in MIXTURES:
        model.double()
    tuned = get_peft_model(model, reftune.ReftConfig(**{**settings, **changes}))
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(model.dtype)
    return tuned.train()


def supervised(name: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """A batch with labels: of a causal model the last tokens, of an encoder-decoder the decoder's, else classes."""
    inputs = tiny_inputs(name, length=8 + seed)
    if name in CAUSAL:
        inputs["labels"] = inputs["input_ids"].clone()
        inputs["labels"][0, :5], inputs["labels"][1, :3] = -100, -100
    elif name in ENCODER_DECODERS:
        inputs["labels"] = inputs["decoder_input_ids"]
        del inputs["decoder_input_ids"]
    else:
        inputs["labels"] = torch.tensor([0, 1]) if name != "roberta" else torch.tensor([1, 2])
    return inputs


def gradients(model: nn.Module, *batches: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Of the summed losses: every forward runs before the one backward."""
    model.zero_grad()
    losses = [model(**batch).loss for batch in batches]
    torch.stack(losses).sum().backward()
    found = [parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad]
    assert any(bool((gradient != 0).any()) for gradient in found)
    return found


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor], name: str) -> None:
    tolerance = {"rtol": 1e-4, "atol": 1e-6} if name in IN_FLOAT32 else {"rtol": 1e-9, "atol": 1e-12}
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


def with_checkpointing(model: nn.Module, reentrant: bool = False) -> nn.Module:
    enable_checkpointing(model, {"use_reentrant": reentrant})
    return model


@pytest.mark.parametrize("name", [*CAUSAL, *ENCODERS, *ENCODER_DECODERS])
def test_checkpointed_gradients_equal_plain_ones_at_every_site(name: str):
    batch = supervised(name)
    for component in COMPONENTS if name == "llama" else ["block_output", "mlp_output", "value_output"]:
        for stack in ("encoder.", "decoder.") if name in ENCODER_DECODERS else ("",):
            model = prepared(name, component=stack + component)
            plain = gradients(model, batch)
            checkpointed = gradients(with_checkpointing(model), batch)
            assert_same(checkpointed, plain, name)


@pytest.mark.parametrize("component", COMPONENTS)
def test_two_forwards_before_one_checkpointed_backward_keep_their_own_rows(component: str):
    batches = supervised("llama"), supervised("llama", seed=3)
    model = prepared("llama", component=component)
    plain = gradients(model, *batches)
    assert_same(gradients(with_checkpointing(model), *batches), plain, "llama")


@pytest.mark.parametrize("name", ["gptj", "bloom", "mpt", "deberta_v2", "gpt2"])
def test_where_plans_are_not_handed_down_two_pending_forwards_are_refused_or_right(name: str):
    batches = supervised(name), supervised(name, seed=3)
    model = prepared(name, component="mlp_output")
    plain = gradients(model, *batches)
    with_checkpointing(model)
    try:
        both = gradients(model, *batches)
    except reftune.ReftuneError as error:
        assert "Two forwards await one backward" in str(error)
    else:
        assert_same(both, plain, name)
    one_by_one = [gradients(model, batch) for batch in batches]
    assert_same([one + other for one, other in zip(*one_by_one, strict=True)], plain, name)


def test_reentrant_checkpointing_gives_the_same_gradients():
    batch = supervised("llama")
    model = prepared("llama", component="mlp_output")
    plain = gradients(model, batch)
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_())
    assert_same(gradients(with_checkpointing(model, reentrant=True), batch), plain, "llama")


def test_training_without_a_known_prompt_end_is_refused():
    model = prepared("llama")
    inputs = tiny_inputs("llama")
    with pytest.raises(reftune.ReftuneError, match="neither labels nor prompt_lengths"):
        model(**inputs)
    with pytest.raises(reftune.ReftuneError, match="empty prompt"):
        model(**inputs, labels=inputs["input_ids"])
    assert model(**inputs, prompt_lengths=torch.tensor([4, 5])).logits.isfinite().all()


class Rows(torch.utils.data.Dataset):
    def __init__(self, count: int = 8, with_lengths: bool = False):
        generator = torch.Generator().manual_seed(0)
        self.rows = []
        for _ in range(count):
            ids = torch.randint(3, 90, (9,), generator=generator)
            labels = ids.clone()
            labels[:5] = -100
            self.rows.append({"input_ids": ids, "labels": labels})
            if with_lengths:
                self.rows[-1]["prompt_lengths"] = torch.tensor(5)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.rows[index]


def trainer_for(model: nn.Module, folder, data: Rows, **arguments) -> Trainer:
    return Trainer(
        model=model,
        train_dataset=data,
        eval_dataset=data,
        args=TrainingArguments(
            output_dir=str(folder), per_device_train_batch_size=4, learning_rate=1e-2, max_steps=6, logging_steps=1,
            report_to=[], use_cpu=True, disable_tqdm=True, remove_unused_columns=False, **arguments,
        ),
    )  # fmt: skip


def losses_of(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_the_plain_trainer_trains_and_its_checkpoints_hold_the_adapter_alone(tmp_path):
    model = get_peft_model(TINY["llama"](), reftune.ReftConfig(r=2, positions="l1", task_type="CAUSAL_LM"))
    trainer = trainer_for(model, tmp_path, Rows(), save_steps=3)
    trainer.train()
    losses = losses_of(trainer)
    assert losses[-1] < losses[0]
    files = {path.name for path in (tmp_path / "checkpoint-3").iterdir()}
    assert "adapter_model.safetensors" in files and not files & {"model.safetensors", "pytorch_model.bin"}
    rotation = next(p for n, p in model.named_parameters() if n.endswith("rotation"))
    model.state_dict()
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(2), rtol=0, atol=1e-6)


def test_label_smoothing_needs_prompt_lengths_and_then_works(tmp_path):
    model = get_peft_model(TINY["llama"](), reftune.ReftConfig(r=2, task_type="CAUSAL_LM"))
    with pytest.raises(reftune.ReftuneError, match="label smoothing"):
        trainer_for(model, tmp_path, Rows(), label_smoothing_factor=0.1).train()
    trainer = trainer_for(model, tmp_path, Rows(with_lengths=True), label_smoothing_factor=0.1)
    trainer.train()
    assert losses_of(trainer)[-1] < losses_of(trainer)[0]


def test_the_text_generation_pipeline_runs_an_adapter(tmp_path, tiny_tokenizer):
    from transformers import pipeline

    model = get_peft_model(TINY["llama"](), reftune.ReftConfig(r=2, init="paper", task_type="CAUSAL_LM")).eval()
    options = {"max_new_tokens": 4, "do_sample": False}
    pipe = pipeline("text-generation", model=model, tokenizer=tiny_tokenizer)
    text = pipe("one two three", return_full_text=False, **options)[0]["generated_text"]
    ids = tiny_tokenizer("one two three", return_tensors="pt")
    expected = model.generate(**ids, pad_token_id=0, **options)[0, ids["input_ids"].shape[1] :]
    assert text == tiny_tokenizer.decode(expected, skip_special_tokens=True)


@pytest.fixture
def tiny_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", "one", "two", "three", *(f"w{i}" for i in range(90))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", padding_side="left"
    )


def test_a_dispatched_model_keeps_its_device_map_and_gives_the_same():
    model = TINY["llama"]()
    inputs = tiny_inputs("llama")
    tuned = get_peft_model(model, reftune.ReftConfig(r=2, init="paper", component="block_input")).eval()
    expected = tuned(**inputs).logits.detach()
    tuned.unload()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        device_map = {"model.embed_tokens": "cpu", "model.layers": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
        dispatched = dispatch_model(model, {**device_map, "model.rotary_emb": "cpu"}, force_hooks=True)
    torch.manual_seed(0)
    again = get_peft_model(dispatched, reftune.ReftConfig(r=2, init="paper", component="block_input")).eval()
    again.load_state_dict(tuned.state_dict(), strict=False)
    assert again(**inputs).logits.shape == expected.shape
    assert dispatched.hf_device_map["lm_head"] == "cpu"
    with torch.no_grad(), again.disable_adapter():
        assert torch.equal(again(**inputs).logits, TINY["llama"]()(**inputs).logits)
