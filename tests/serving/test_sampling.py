"""Each answer's choice of tokens against transformers' own processors, and against frequencies."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from transformers import LogitsProcessorList
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from reftune import ReftuneError
from reftune.serving.requests import Sampling, Token
from reftune.serving.sampling import Choosing

PROMPT = [3, 5, 5]


def logits(size: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 2


def chosen(sampling: Sampling, scores: torch.Tensor, times: int = 1) -> list[int]:
    choosing = Choosing(sampling, PROMPT)
    return [choosing.next(scores, int(scores.argmax())).id for _ in range(times)]


@pytest.mark.parametrize(
    ("sampling", "processors"),
    [
        (Sampling(temperature=1.0, seed=1), []),
        (Sampling(temperature=0.5, seed=2), [TemperatureLogitsWarper(0.5)]),
        (Sampling(temperature=1.0, top_k=4, seed=3), [TopKLogitsWarper(4)]),
        (Sampling(temperature=1.5, top_p=0.7, seed=4), [TemperatureLogitsWarper(1.5), TopPLogitsWarper(0.7)]),
        (
            Sampling(temperature=0.8, top_k=6, top_p=0.9, seed=5),
            [TemperatureLogitsWarper(0.8), TopKLogitsWarper(6), TopPLogitsWarper(0.9)],
        ),
    ],
    ids=["plain", "temperature", "top_k", "top_p", "all"],
)
def test_tokens_come_as_often_as_transformers_processors_make_them_likely(sampling: Sampling, processors) -> None:
    scores, times = logits(), 4000
    shares = LogitsProcessorList(processors)(torch.tensor([PROMPT]), scores[None].clone()).softmax(-1)[0]
    found = Counter(chosen(sampling, scores, times))
    for token, share in enumerate(shares.tolist()):
        assert abs(found[token] / times - share) < 4 * (share * (1 - share) / times) ** 0.5 + 1e-9


def test_the_repetition_penalty_is_transformers() -> None:
    for seed in range(20):
        scores = logits(seed=seed)
        expected = RepetitionPenaltyLogitsProcessor(2.5)(torch.tensor([PROMPT]), scores[None].clone())[0]
        assert chosen(Sampling(repetition_penalty=2.5), scores) == [int(expected.argmax())]


def test_penalties_count_the_answer_and_not_the_prompt() -> None:
    scores = torch.tensor([0.0, 1.0, 3.0, 3.5, 0.0])
    assert chosen(Sampling(frequency_penalty=1.0), scores, 4) == [3, 2, 3, 2]
    assert chosen(Sampling(presence_penalty=1.0), scores, 4) == [3, 2, 3, 3]


def test_biases_are_added_and_may_forbid() -> None:
    scores = torch.tensor([0.0, 1.0, 3.0])
    assert chosen(Sampling(logit_bias={0: 4.0}), scores) == [0]
    assert chosen(Sampling(logit_bias={2: -100.0}), scores) == [1]


def test_logprobs_are_of_the_models_own_distribution() -> None:
    scores = logits()
    token = Choosing(Sampling(temperature=0.3, logit_bias={4: 100.0}, logprobs=2), PROMPT).next(scores, 0)
    expected = scores.log_softmax(-1)
    assert token.id == 4 and token.logprob == pytest.approx(float(expected[4]))
    assert [one for one, _ in token.top] == expected.topk(2).indices.tolist()
    assert Choosing(Sampling(logprobs=0), PROMPT).next(scores, 0) == Token(0, pytest.approx(float(expected[0])), ())


def test_a_seed_gives_the_same_tokens_and_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    one, same, other = (chosen(Sampling(temperature=2.0, seed=s), logits(), 20) for s in (7, 7, 8))
    assert one == same != other
    assert chosen(Sampling(temperature=2.0), logits(), 20) != chosen(Sampling(temperature=2.0), logits(), 20)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "values",
    [{"temperature": -0.1}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_p": 1.1}, {"top_k": -1},
     {"repetition_penalty": 0.0}],
    ids=str,
)  # fmt: skip
def test_settings_out_of_range_are_refused(values) -> None:
    with pytest.raises(ReftuneError, match=next(iter(values))):
        Choosing(Sampling(**values), PROMPT)
