"""What an adapter does: the directions that its edits read and write, in words; how much, where, to what effect.

A linear edit is h + (hA + b)B. The singular value decomposition AB = U S V^T orders it: along each column of U it
reads the state, and writes what it finds, times S, along the row of V^T; bB is what it writes whatever it reads. A
direction is put in
words by the unembedding: the tokens whose logits it would raise most. Early layers are far from the unembedding, and
such words say little there (Belrose et al., arXiv:2303.08112).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from reftune.data.tokenising import Encoding
from reftune.edits import Edit
from reftune.engine.attach import Attachment
from reftune.engine.hooks import Engine
from reftune.engine.intervention import Intervention
from reftune.errors import ReftuneError

Likeliest: TypeAlias = "list[tuple[str, float]]"

_PROMPTS_SHOWN = 4


@dataclass(frozen=True)
class Direction:
    """One direction of an edit.

    Attributes:
        strength: the singular value of AB; of the constant part, the length of bB.
        reads: tokens nearest to what is read, towards and against (empty for the constant part).
        writes: tokens that writing along it makes likelier, and unlikelier.
    """

    strength: float
    reads: tuple[list[str], list[str]]
    writes: tuple[list[str], list[str]]


@dataclass(frozen=True)
class SiteExplanation:
    """One edit of an adapter.

    Attributes:
        path: the block (``:suffix``: the second edit of an untied pair).
        layer: its number.
        component: where in it.
        early: in the lower half of the layers, where the words are unreliable.
        directions: strongest first; none where the edit is not linear.
        constant: what is written whatever is read.
        change: length of the change relative to the state's, by the token's place in the prompt (from the end, -1 the
            last), averaged over the prompts.
        removal: how far the next-token distribution moves when this edit alone is left out (KL divergence in nats).
    """

    path: str
    layer: int | None
    component: str
    early: bool
    directions: list[Direction]
    constant: Direction | None
    change: dict[int, float]
    removal: float


@dataclass(frozen=True)
class Explanation:
    """All edits of an adapter, in the order of the layers.

    Attributes:
        sites: the edits.
        effect: how far the adapter as a whole moves the next-token distribution (KL divergence in nats).
        next_tokens: for each prompt the likeliest next tokens and their probabilities, without the adapter and with it.
    """

    sites: list[SiteExplanation]
    effect: float
    next_tokens: list[tuple[Likeliest, Likeliest]]

    def text(self, directions: int = 3) -> str:
        """The explanation in lines of text."""
        lines = [f"the adapter moves the next-token distribution by {self.effect:.3f} nats (KL divergence)"]
        for number, sides in enumerate(self.next_tokens[:_PROMPTS_SHOWN], start=1):
            before, after = (", ".join(f"{token!r} {share:.0%}" for token, share in side) for side in sides)
            lines.append(f"prompt {number}, next token: without it {before}; with it {after}")
        for site in self.sites:
            change = ", ".join(f"{place}: {value:.0%}" for place, value in sorted(site.change.items()))
            lines.append(
                f"{site.path} ({site.component}): without it {site.removal:.3f} nats; change by position {change}"
            )
            if site.early and site.constant is not None:
                lines.append("  an early layer: these words are unreliable, the figures above are not")
            if site.constant is not None and site.constant.strength > 0:
                lines.append(f"  always writes {_words(site.constant.writes)}, length {site.constant.strength:.2f}")
            for direction in site.directions[:directions]:
                reads, writes = _words(direction.reads), _words(direction.writes)
                lines.append(f"  reads {reads}, writes {writes}, strength {direction.strength:.2f}")
        return "\n".join(lines)


@torch.no_grad()
def explain(
    adapted: Any, tokenizer: Any, prompts: Any, *, adapter_name: str | None = None, words: int = 5
) -> Explanation:
    """Explain an adapter on some prompts.

    Args:
        adapted: a PEFT model with a ReFT adapter, or what ``reftune.attach`` returned.
        tokenizer: of the base model: prompts go through its chat template where it has one, as in training. Or how
            prompts became tokens in training, the ``encoding`` of ``reftune.inference.loading.load_edited(folder)``;
            ``Encoding(tokenizer, template="%s")`` takes texts as they are.
        prompts: a list of texts, conversations or examples, run one by one.
        adapter_name: which adapter; None: the one that is active.
        words: how many tokens put a direction, and a next token, in words.

    Raises:
        ReftuneError: no adapter, no prompts, or arguments in another order.
    """
    engine, name = _engine_of(adapted, adapter_name)
    model = engine.model
    encoding = _encoding(tokenizer)
    rows, tokenizer = encoding.prompt_ids(_listed(prompts)), encoding.tokenizer
    was_training = model.training
    model.eval()
    try:
        device = next(model.parameters()).device
        ids = [torch.tensor([row], device=device) for row in rows]
        batches = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]
        found = [
            (path, intervention, part, edit)
            for path, intervention in engine.interventions.items()
            if name in intervention.placements
            for part, edit in intervention.parts(name)
        ]
        with_all, changes = _run(model, batches, [edit for *_, edit in found])
        without = _without(model, batches, [(i, name) for _, i, _, _ in found])
        sites = []
        for (path, intervention, part, edit), change in zip(found, changes, strict=True):
            site = intervention.placements[name].site
            directions, constant = _directions(model, tokenizer, edit, words)
            early = site.stack is not None and 2 * (site.layer or 0) < len(site.stack.block_paths)
            removal = _divergence(with_all, _without(model, batches, [(intervention, name)]))
            label = f"{path}:suffix" if part == "suffix" else path
            sites.append(
                SiteExplanation(label, site.layer, site.component, early, directions, constant, change, removal)
            )
        both = [[_likeliest(tokenizer, logs, words) for logs in side] for side in (without, with_all)]
        return Explanation(sites, _divergence(with_all, without), list(zip(*both, strict=True)))
    finally:
        model.train(was_training)


def _encoding(tokenizer: Any) -> Encoding:
    if isinstance(tokenizer, Encoding):
        return tokenizer
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ReftuneError(
            f"explain(adapted, tokenizer, prompts): the second argument is a {type(tokenizer).__name__}; give the base "
            "model's tokenizer there, or an Encoding"
        )
    return Encoding(tokenizer, None if tokenizer.chat_template else "%s")


def _listed(prompts: Any) -> Sequence[Any]:
    if not isinstance(prompts, Sequence) or isinstance(prompts, str):
        raise ReftuneError(f"prompts is a {type(prompts).__name__}: give a list, such as ['Who are you?']")
    if not prompts:
        raise ReftuneError("prompts=[]: an adapter is explained on at least one prompt")
    return prompts


def _likeliest(tokenizer: Any, logs: Float[Tensor, " vocabulary"], count: int) -> Likeliest:
    shares, tokens = logs.exp().topk(count)
    return [(tokenizer.decode([token]), share) for token, share in zip(tokens.tolist(), shares.tolist(), strict=True)]


def _engine_of(adapted: Any, adapter_name: str | None) -> tuple[Engine, str]:
    if isinstance(adapted, Attachment):
        return adapted.engine, adapted.name
    base = adapted.get_base_model() if hasattr(adapted, "get_base_model") else adapted
    engine = Engine.of(base)
    if engine is None:
        raise ReftuneError("this model carries no ReFT adapter: pass a PEFT model with one, or what attach returned")
    name = adapter_name or getattr(adapted, "active_adapter", None) or engine.adapter_names()[0]
    if name not in engine.adapter_names():
        raise ReftuneError(f"adapter_name={name!r}: this model has {engine.adapter_names()}")
    return engine, name


def _run(
    model: nn.Module, batches: Sequence[Any], edits: Sequence[nn.Module]
) -> tuple[Float[Tensor, "prompts vocabulary"], list[dict[int, float]]]:
    """Next-token log-probabilities, and each edit's relative change by place from the end of the prompt."""
    sums: list[dict[int, list[float]]] = [{} for _ in edits]
    logs = []
    for batch in batches:
        seen: dict[int, tuple[Tensor, Tensor]] = {}
        handles = [edit.register_forward_hook(partial(_keep, seen, i)) for i, edit in enumerate(edits)]
        try:
            logs.append(model(**batch).logits[0, -1].float().log_softmax(-1))
        finally:
            for handle in handles:
                handle.remove()
        length = batch["input_ids"].shape[1]
        for index, (before, after) in seen.items():
            ratios = ((after - before).float().norm(dim=-1) / before.float().norm(dim=-1)).tolist()
            for place, ratio in zip(_places(model, edits[index], length), ratios, strict=True):
                sums[index].setdefault(place, []).append(ratio)
    return torch.stack(logs), [{place: sum(r) / len(r) for place, r in by.items()} for by in sums]


def _keep(seen: dict[int, tuple[Tensor, Tensor]], index: int, edit: nn.Module, args: Any, output: Tensor) -> None:
    seen[index] = (args[0], output)


def _places(model: nn.Module, edit: nn.Module, length: int) -> list[int]:
    engine = Engine.of(model)
    assert engine is not None
    for intervention in engine.interventions.values():
        for name, placement in intervention.placements.items():
            for part, other in intervention.parts(name):
                if other is edit:
                    chosen = sorted(placement.positions.ordinals(length))
                    if part != "both":
                        count = int(placement.positions.counts(torch.tensor(length))[0])
                        chosen = chosen[:count] if part == "prefix" else chosen[count:]
                    return [ordinal - length for ordinal in chosen]
    raise ReftuneError("the edit is on no block of this model")


def _without(model: nn.Module, batches: Sequence[Any], left_out: Sequence[tuple[Intervention, str]]) -> Tensor:
    """Next-token log-probabilities with some edits left out."""
    before = [intervention.placements[name].scale for intervention, name in left_out]
    try:
        for intervention, name in left_out:
            intervention.placements[name].scale = 0.0
        return torch.stack([model(**batch).logits[0, -1].float().log_softmax(-1) for batch in batches])
    finally:
        for (intervention, name), scale in zip(left_out, before, strict=True):
            intervention.placements[name].scale = scale


def _divergence(first: Tensor, second: Tensor) -> float:
    return float(F.kl_div(second, first, log_target=True, reduction="batchmean"))


def _directions(
    model: nn.Module, tokenizer: Any, edit: nn.Module, words: int
) -> tuple[list[Direction], Direction | None]:
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if not isinstance(edit, Edit) or not edit.folds or head is None or head.weight.shape[1] != edit.width:
        return [], None
    folded = edit.fold()
    unembedding = head.weight.float()
    U, S, V = torch.linalg.svd(folded.A.float() @ folded.B.float(), full_matrices=False)

    def nearest(vector: Tensor) -> tuple[list[str], list[str]]:
        logits = unembedding @ vector.to(unembedding)
        logits = logits - logits.mean()
        both = logits.topk(words).indices, (-logits).topk(words).indices
        return tuple([tokenizer.decode([token]) for token in side.tolist()] for side in both)  # type: ignore[return-value]

    directions = [Direction(float(S[i]), nearest(U[:, i]), nearest(V[i])) for i in range(edit.r) if float(S[i]) > 1e-6]
    always = folded.b.float() @ folded.B.float()
    return directions, Direction(float(always.norm()), ([], []), nearest(always))


def _words(sides: tuple[list[str], list[str]]) -> str:
    towards, against = (" ".join(repr(word) for word in side) for side in sides)
    return f"+[{towards}] -[{against}]"
