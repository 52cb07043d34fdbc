"""Attention request by request: the same answers, and the model's own attention everywhere else."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from reftune.serving import packed_attention
from reftune.serving.engine import EmbeddedEngine
from tests.serving.answers import PROMPTS, ask_all, generated
from tests.tiny_models import CAUSAL


@pytest.fixture()
def llama() -> Any:
    model = CAUSAL["llama"]()
    model.generation_config.eos_token_id = None
    return model


@pytest.mark.parametrize("batch_tokens", [512, 12])
def test_no_forward_builds_a_mask_over_all_requests(llama, batch_tokens: int, monkeypatch) -> None:
    """Whole prompts, later chunks and single tokens, with keys and values of the cache before them."""
    expected = {(None, prompt): generated(llama, prompt) for prompt in PROMPTS}
    sizes: list[tuple[int, int]] = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def counted(query: Any, key: Any, *args: Any, **kwargs: Any) -> Any:
        sizes.append((query.shape[2], key.shape[2]))
        return attend(query, key, *args, **kwargs)

    monkeypatch.setattr(packed_attention.F, "scaled_dot_product_attention", counted)
    with EmbeddedEngine(llama, None, page_tokens=8, batch_tokens=batch_tokens) as engine:
        for _ in range(2):
            assert ask_all(engine, {}, list(expected)) == expected
        assert engine._manager.batch_processor.inputs_and_outputs.attention_mask is None
    longest = max(map(len, PROMPTS)) + 10
    assert max(key for _, key in sizes) <= longest
    assert any(query == key > 1 for query, key in sizes) and any(1 < query < key for query, key in sizes)


def test_other_forwards_of_the_model_are_as_before_and_closing_restores_its_setting(llama) -> None:
    ids = torch.randint(3, 96, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    answer = generated(llama, PROMPTS[3])
    with torch.no_grad():
        before = llama(ids, attention_mask=mask).logits[mask.bool()]
        with EmbeddedEngine(llama, None):
            assert llama.config._attn_implementation == packed_attention.NAME
            assert torch.equal(llama(ids, attention_mask=mask).logits[mask.bool()], before)
            assert generated(llama, PROMPTS[3]) == answer
    assert llama.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("name", "whether"),
    [
        ("llama", True),
        ("qwen3_moe", True),
        ("gpt2", True),
        ("mistral", False),
        ("gemma2", False),
        ("gemma3", False),
        ("falcon_rw", False),
    ],
)
def test_only_attention_over_the_whole_text_with_nothing_added_is_taken_apart(name: str, whether: bool) -> None:
    assert packed_attention.fits(CAUSAL[name]()) == whether
