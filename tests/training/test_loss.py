"""The completion loss is transformers' loss."""

from typing import Any

import pytest
import torch
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.trainer_pt_utils import LabelSmoother

from reftune.training.loss import completion_loss


def _case(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    logits = torch.randn(3, 6, 11).to(dtype)
    labels = torch.randint(0, 11, (3, 6))
    labels[:, :2] = -100
    labels[1, 4:] = -100
    return logits, labels


def _shifted(labels: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(labels, (0, 1), value=-100)[..., 1:]


@pytest.mark.parametrize("items", [None, 7, torch.tensor(23)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_equals_the_causal_language_model_loss(dtype: torch.dtype, items: Any) -> None:
    logits, labels = _case(dtype)
    expected = ForCausalLMLoss(logits, labels, 11, num_items_in_batch=items)
    torch.testing.assert_close(completion_loss(logits, _shifted(labels), 0.0, items), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("items", [None, 7, torch.tensor(23)])
@pytest.mark.parametrize("epsilon", [0.1, 0.5])
def test_smoothing_equals_the_label_smoother(epsilon: float, items: Any) -> None:
    logits, labels = _case()
    expected = LabelSmoother(epsilon)({"logits": logits}, labels, shift_labels=True, num_items_in_batch=items)
    torch.testing.assert_close(completion_loss(logits, _shifted(labels), epsilon, items), expected, rtol=0, atol=1e-6)


def test_rows_left_out_beforehand_change_nothing() -> None:
    logits, labels = _case()
    targets = _shifted(labels)
    kept = targets != -100
    for epsilon in (0.0, 0.1):
        torch.testing.assert_close(
            completion_loss(logits[kept], targets[kept], epsilon), completion_loss(logits, targets, epsilon)
        )


def test_float64_is_not_rounded() -> None:
    logits = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: completion_loss(x, torch.tensor([1, -100, 4, 0]), 0.2), (logits,))


def test_nothing_supervised_is_nan_as_in_transformers() -> None:
    logits, labels = torch.randn(2, 5), torch.full((2,), -100)
    assert completion_loss(logits, labels).isnan()
    assert completion_loss(logits, labels, num_items_in_batch=3) == 0
