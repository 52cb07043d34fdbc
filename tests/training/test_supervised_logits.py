"""Logits at supervised positions give the model's own loss and gradients."""

import copy
from typing import Any, cast

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional

from reftune.training.loss import completion_loss
from reftune.training.supervised_logits import (
    SupervisedLogitsError,
    head_sees_only,
    output_head,
    shifted,
    supervised_forward,
    supervised_rows,
    unsupported_reason,
)
from tests.tiny_models import TINY
from tests.training.toy_rows import batch

FAMILIES = ["llama", "gemma2", "gpt2", "cohere"]


def reference(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Cross-entropy over the logits of every position, in the model's own precision."""
    labels = inputs["labels"]
    logits = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_equals_the_model_s_own(family: str, side: str) -> None:
    model, inputs = TINY[family](), batch(side)
    assert unsupported_reason(model) is None
    expected = model(**inputs).loss
    found = supervised_forward(model, inputs)
    assert found.logits.shape[:2] == (1, int((inputs["labels"] != -100).sum()))
    torch.testing.assert_close(completion_loss(found.logits, found.targets), expected, rtol=0, atol=1e-6)


# Gemma 2 softens its attention in float32, where a float64 mask is -inf: left padding gives NaN in the model itself.
@pytest.mark.parametrize(
    ("family", "side"), [(f, s) for f in FAMILIES for s in ("left", "right") if (f, s) != ("gemma2", "left")]
)
def test_gradients_equal_those_of_all_logits_in_float64(family: str, side: str) -> None:
    model, inputs = TINY[family]().double(), batch(side)
    reference(model, inputs).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    found = supervised_forward(model, inputs)
    completion_loss(found.logits, found.targets).backward()
    got = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-9, atol=1e-9, msg=name)


def test_soft_capping_still_applies() -> None:
    model = TINY["gemma2"]()
    model.config.final_logit_softcapping = 0.05
    found = supervised_forward(model, batch())
    assert found.logits.abs().max() <= 0.05


def test_half_precision_logits_give_a_float32_loss() -> None:
    model, inputs = TINY["llama"]().bfloat16(), batch()
    found = supervised_forward(model, inputs)
    loss = completion_loss(found.logits, found.targets)
    assert found.logits.dtype == torch.bfloat16 and loss.dtype == torch.float32
    torch.testing.assert_close(loss, model(**inputs).loss, rtol=0, atol=2e-3)


def test_the_first_token_and_the_padding_are_never_targets() -> None:
    labels = torch.tensor([[7, -100, 8, 9], [-100, -100, -100, 5]])
    found, targets = supervised_rows(shifted(labels))
    assert found.tolist() == [1, 2, 6] and targets.tolist() == [8, 9, 5]


def test_a_batch_without_labels_has_a_loss_of_zero_over_the_others_tokens() -> None:
    model, inputs = TINY["llama"](), batch()
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    found = supervised_forward(model, inputs)
    assert found.logits.shape[1] == 0
    assert completion_loss(found.logits, found.targets, num_items_in_batch=5).item() == 0


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [5, 8], "lm_head": [5, 8]}},
    ],
)
def test_a_head_that_peft_has_wrapped_still_sees_supervised_rows_alone(settings: dict[str, Any]) -> None:
    model = get_peft_model(TINY["llama"](), LoraConfig(r=2, task_type="CAUSAL_LM", **settings))
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    inputs = batch()
    found = supervised_forward(model, inputs)
    assert found.logits.shape[1] == int((inputs["labels"] != -100).sum())
    torch.testing.assert_close(completion_loss(found.logits, found.targets), model(**inputs).loss, rtol=0, atol=1e-6)


def test_the_hook_goes_away_when_the_forward_fails_too() -> None:
    model, inputs = TINY["llama"](), batch()
    before = hooks(model)
    supervised_forward(model, inputs)
    assert hooks(model) == before
    with pytest.raises(IndexError):
        supervised_forward(model, {**inputs, "input_ids": torch.full_like(inputs["input_ids"], 10_000)})
    assert hooks(model) == before


def test_the_batch_of_the_caller_keeps_its_labels() -> None:
    inputs = batch()
    supervised_forward(TINY["llama"](), inputs)
    assert "labels" in inputs


def test_a_backbone_that_shortens_the_sequence_is_refused() -> None:
    model, inputs = TINY["llama"](), batch()
    with pytest.raises(SupervisedLogitsError, match="its head ran 1 times"):
        supervised_forward(model, {**inputs, "logits_to_keep": 2})


def test_a_head_used_without_being_called_gives_the_same_rows() -> None:
    model, inputs = TINY["llama"](), batch()
    expected = supervised_forward(model, inputs).logits

    class Uncalled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = copy.deepcopy(model)
            self.head = nn.Linear(2, 2)

        def get_output_embeddings(self) -> nn.Module:
            return self.head

        def forward(self, **kwargs: Any) -> dict[str, torch.Tensor]:
            return {"logits": self.inner(**kwargs).logits}

    found = supervised_forward(Uncalled(), inputs)
    torch.testing.assert_close(found.logits, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "reason"), [("t5", "encoder-decoder"), ("bart", "encoder-decoder"), ("bert", "no output embeddings")]
)
def test_models_that_cannot_say_why(family: str, reason: str) -> None:
    assert reason in (unsupported_reason(TINY[family]()) or "")


def test_a_masked_language_model_keeps_its_own_loss() -> None:
    from transformers import BertConfig, BertForMaskedLM

    model = BertForMaskedLM(cast(BertConfig, TINY["bert"]().config))
    assert output_head(model) is not None
    assert "causal language model loss" in (unsupported_reason(model) or "")


def test_a_router_s_auxiliary_loss_is_not_dropped() -> None:
    model = TINY["mixtral"]()
    assert unsupported_reason(model) is None
    model.config.output_router_logits = True
    assert "auxiliary loss" in (unsupported_reason(model) or "")


def test_a_compiled_model_takes_the_plain_path() -> None:
    model = TINY["llama"]()
    assert "compiled" in (unsupported_reason(torch.compile(model)) or "")  # type: ignore[arg-type]


def test_without_a_head_the_hook_cannot_be_installed() -> None:
    with pytest.raises(SupervisedLogitsError, match="no output embeddings"):
        with head_sees_only(TINY["bert"](), torch.zeros(1, dtype=torch.long), (1, 1)):
            pass
