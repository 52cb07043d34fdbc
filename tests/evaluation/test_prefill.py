"""A prompt runs once for all of its options, and the options score as if each had run with its whole prompt."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import MambaConfig, MambaForCausalLM

import reftune
from reftune.errors import ReftuneError
from reftune.evaluation import prefill
from reftune.evaluation.prefill import Continued, option_log_likelihoods, prefill_obstacle
from tests.tiny_models import CAUSAL, ENCODERS

# Sliding window, hybrid cache, mixture of experts, absolute positions, parallel blocks, attention sinks.
FAMILIES = ["llama", "mistral", "gemma3", "qwen3_moe", "gpt2", "falcon", "gpt_oss"]


def rows() -> list[Continued]:
    """Prompts of 1 to 12 tokens (the sliding window is 4); options with and without a common beginning."""
    generator = torch.Generator().manual_seed(1)

    def random(count: int) -> list[int]:
        return torch.randint(3, 96, (count,), generator=generator).tolist()

    common = random(2)
    return [
        Continued(random(5), [common + [7], common + [8, 9, 10, 11], [*common, 9, 9]]),
        Continued(random(12), [random(1), random(6), random(2), random(3)]),
        Continued(random(1), [random(2), random(1)]),
        Continued(random(9), [common + [3], common + [4], common + [5]]),
        Continued(random(12), [random(3)]),
    ]


def double(family: str) -> Any:
    model: Any = CAUSAL[family]().double()
    if "moe" in family or family == "gpt_oss":
        model.set_experts_implementation("eager")  # the grouped kernel has no float64
    return model


def edited(family: str, positions: str) -> Any:
    model: Any = get_peft_model(
        double(family),
        reftune.ReftConfig(
            r=2, layers_to_transform="all", positions=positions, share_weights=False, task_type="CAUSAL_LM"
        ),
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "reft_" in name and name.endswith("bias"):
                parameter.copy_(torch.randn_like(parameter) * 2)
    return model


def one_by_one(model: Any, row: Continued) -> list[float]:
    """The definition: a full forward of every (prompt, option) pair alone, nothing padded, nothing reused."""
    found = []
    for option in row.options:
        ids = torch.tensor([[*row.prompt, *option]])
        known = {"prompt_lengths": torch.tensor([len(row.prompt)])} if hasattr(model, "peft_config") else {}
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False, **known).logits[0].log_softmax(-1)
        start = len(row.prompt) - 1
        found.append(float(sum(logits[start + step, token] for step, token in enumerate(option))))
    return found


@contextmanager
def counted_tokens(model: nn.Module) -> Iterator[list[int]]:
    """Attended or not, the tokens that each forward sends through the first block."""
    block = next(module for name, module in model.named_modules() if name.endswith(("layers.0", "h.0")))
    seen: list[int] = []

    def count(module: nn.Module, args: Any, kwargs: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        seen.append(hidden.shape[0] * hidden.shape[1])

    handle = block.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


@pytest.mark.parametrize("positions", ["l1", "f2+l2", "prompt", "all", "generated", "l1+generated"])
@pytest.mark.parametrize("family", FAMILIES)
def test_options_score_as_in_a_full_forward_each(family: str, positions: str) -> None:
    model = edited(family, positions)
    expected = [one_by_one(model, row) for row in rows()]
    with model.disable_adapter():
        without = option_log_likelihoods(model, rows(), batch_size=3, check=False)
    assert prefill_obstacle(model) is None
    for batch_size in (3, 8):
        found = option_log_likelihoods(model, rows(), batch_size=batch_size, check=False)
        for ours, truth, base in zip(found, expected, without, strict=True):
            assert ours == pytest.approx(truth, abs=1e-9, rel=0)
            assert max(abs(a - b) for a, b in zip(ours, base, strict=True)) > 1e-3  # the edit is at work
    plain = option_log_likelihoods(model, rows(), batch_size=4, reuse=False)
    for ours, truth in zip(plain, expected, strict=True):
        assert ours == pytest.approx(truth, abs=1e-9, rel=0)


def test_a_plain_model_and_lora_score_as_in_a_full_forward_each() -> None:
    for model in (double("llama"), get_peft_model(double("llama"), LoraConfig(r=2, init_lora_weights=False))):
        expected = [_plain_truth(model, row) for row in rows()]
        found = option_log_likelihoods(model, rows(), check=False)
        for ours, truth in zip(found, expected, strict=True):
            assert ours == pytest.approx(truth, abs=1e-9, rel=0)


def _plain_truth(model: Any, row: Continued) -> list[float]:
    return one_by_one(model.base_model.model if hasattr(model, "peft_config") else model, row)


def test_virtual_tokens_take_the_plain_path_and_say_so(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model: Any = get_peft_model(
        double("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    ).double()
    prefill._already_logged.clear()
    with caplog.at_level(logging.WARNING, "reftune.evaluation.prefill"):
        found = option_log_likelihoods(model, rows())
        option_log_likelihoods(model, rows())
    assert [record.getMessage() for record in caplog.records] == [
        "Every option runs with its whole prompt: PROMPT_TUNING puts virtual tokens before every forward"
    ]
    row = rows()[1]
    ids = torch.tensor([[*row.prompt, *row.options[1]]])
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, 3:].log_softmax(-1)
    truth = sum(float(logits[len(row.prompt) - 1 + step, token]) for step, token in enumerate(row.options[1]))
    assert found[1][1] == pytest.approx(truth, abs=1e-9)


def test_a_recurrent_model_takes_the_plain_path() -> None:
    config = MambaConfig(vocab_size=97, hidden_size=16, state_size=4, num_hidden_layers=2, expand=2, time_step_rank=2)
    model: Any = MambaForCausalLM(config).eval()
    assert "past_key_values" in str(prefill_obstacle(model))
    found = option_log_likelihoods(model, rows())
    for ours, row in zip(found, rows(), strict=True):
        assert ours == pytest.approx(one_by_one(model, row), abs=1e-4)


def test_prompt_tokens_run_once_and_not_once_an_option() -> None:
    model = edited("llama", "f2+l2")
    row = Continued(list(range(3, 23)), [[40, 41, 42], [50, 51], [60, 61, 62], [70]])
    with counted_tokens(model) as seen:
        option_log_likelihoods(model, [row], check=False)
    # The prompt, then what stands before each longer option's last token, padded to a rectangle.
    assert seen == [20, 3 * 2]
    with counted_tokens(model) as seen:
        option_log_likelihoods(model, [row], reuse=False)
    assert sum(seen) == 4 * (20 + 3)


def test_options_that_differ_in_their_last_token_take_one_forward() -> None:
    model = edited("gemma3", "all")
    row = Continued([5, 6, 7], [[40, 41, last] for last in (50, 51, 52, 53)])
    with counted_tokens(model) as seen:
        found = option_log_likelihoods(model, [row], check=False)
    assert seen == [3 + 2]
    assert found[0] == pytest.approx(one_by_one(model, row), abs=1e-9, rel=0)


def test_wrong_reuse_is_noticed_and_switched_off(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = edited("llama", "l1")
    truth = option_log_likelihoods(model, rows(), reuse=False)
    right = prefill._copied

    def spoiled(cache: Any, *more: Any) -> Any:
        fresh = right(cache, *more)
        for layer in fresh.layers:
            layer.keys = layer.keys * float("nan")
        return fresh

    monkeypatch.setattr(prefill, "_copied", spoiled)
    prefill._already_logged.clear()
    with caplog.at_level(logging.WARNING, "reftune.evaluation.prefill"):
        found = option_log_likelihoods(model, rows())
    assert found == truth
    assert "reusing prompts changes" in caplog.text


def test_training_mode_is_put_back_and_dropout_does_not_act() -> None:
    model = edited("llama", "l1")
    model.train()
    model.base_model.model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    for module in model.modules():
        if hasattr(module, "dropout") and isinstance(module.dropout, nn.Dropout):
            module.dropout.p = 0.5
    first, second = (option_log_likelihoods(model, rows()) for _ in range(2))
    assert first == second
    assert [module.training for module in model.modules()] == before


def test_models_and_rows_that_cannot_be_scored_are_named() -> None:
    with pytest.raises(ReftuneError, match="BertForSequenceClassification is not a causal"):
        option_log_likelihoods(ENCODERS["bert"](), rows())
    with pytest.raises(ReftuneError, match="row 3: option 2 has no tokens"):
        Continued([1], [[2], []], "row 3")
    with pytest.raises(ReftuneError, match="row 3: the prompt has no tokens"):
        Continued([], [[2]], "row 3")
    assert option_log_likelihoods(CAUSAL["llama"](), []) == []
