"""Each answer's own choice of tokens: its settings, its generator, its record of what was likely."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from reftune.errors import ReftuneError
from reftune.serving.requests import Sampling, Token


class Choosing:
    """Chooses the tokens of one answer.

    Args:
        sampling: the answer's settings.
        prompt: token ids, which the repetition penalty reads.
    """

    def __init__(self, sampling: Sampling, prompt: list[int]):
        if not (sampling.temperature >= 0 and 0 < sampling.top_p <= 1 and sampling.top_k >= 0):
            raise ReftuneError(
                f"temperature={sampling.temperature}, top_p={sampling.top_p}, top_k={sampling.top_k}: write a "
                "temperature of at least 0, a top_p above 0 and up to 1, a top_k of at least 0."
            )
        if not sampling.repetition_penalty > 0:
            raise ReftuneError(f"repetition_penalty={sampling.repetition_penalty}: write a number above 0.")
        self.sampling = sampling
        self.prompt = prompt
        self.written: list[int] = []
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed % 2**63)
        self._penalised = sampling.frequency_penalty != 0 or sampling.presence_penalty != 0
        penalties = self._penalised or sampling.repetition_penalty != 1 or bool(sampling.logit_bias)
        self._plain = sampling.temperature == 0 and sampling.logprobs is None and not penalties

    def next(self, logits: Float[Tensor, " vocabulary"], likeliest: int) -> Token:
        """The answer's next token.

        Args:
            logits: of the model, untouched.
            likeliest: the token of the highest logit.
        """
        token = likeliest if self._plain else self._choose(logits)
        self.written.append(token)
        if self.sampling.logprobs is None:
            return Token(token)
        logprobs = logits.float().log_softmax(-1)
        top = logprobs.topk(min(self.sampling.logprobs, len(logprobs)))
        alternatives = tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        return Token(token, float(logprobs[token]), alternatives)

    def _choose(self, logits: Tensor) -> int:
        sampling, scores = self.sampling, logits.float()
        if sampling.repetition_penalty != 1:
            seen = torch.tensor([*self.prompt, *self.written], device=scores.device).unique()
            found = scores[seen]
            penalty = sampling.repetition_penalty
            scores = scores.index_copy(0, seen, torch.where(found < 0, found * penalty, found / penalty))
        if self._penalised and self.written:
            ids, counts = torch.tensor(self.written, device=scores.device).unique(return_counts=True)
            scores = scores.index_add(0, ids, -(sampling.frequency_penalty * counts + sampling.presence_penalty))
        if sampling.logit_bias:
            ids = torch.tensor(list(sampling.logit_bias), device=scores.device)
            bias = torch.tensor(list(sampling.logit_bias.values()), dtype=scores.dtype, device=scores.device)
            scores = scores.index_add(0, ids, bias)
        if sampling.temperature == 0:
            return int(scores.argmax())
        scores = scores / sampling.temperature
        if sampling.top_k:
            least = scores.topk(min(sampling.top_k, len(scores))).values[-1]
            scores = scores.masked_fill(scores < least, -torch.inf)
        shares = scores.softmax(-1)
        if sampling.top_p < 1:
            ordered, order = shares.sort(descending=True)
            kept = ordered.cumsum(0) - ordered < sampling.top_p  # the likeliest is always kept
            shares = torch.zeros_like(shares).index_copy(0, order, ordered * kept)
        return int(torch.multinomial(shares.cpu(), 1, generator=self._generator))
