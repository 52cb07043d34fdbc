"""What is minimised on pairs of answers: batches whose first half are positive answers, the second the negative ones.

| objective | what a pair costs | source |
|---|---|---|
| `reps` | a preference for the positive answer under the edit, and for the negative one without | arXiv 2505.20809 |
| `reft-r1` | the loss of both answers, under a vector added as strongly as it is found in the row | arXiv 2501.17148 |
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from reftune.edits import LobireftEdit
from reftune.engine.forwards import token_arguments
from reftune.engine.hooks import ENGINE, edit_passing
from reftune.engine.intervention import Placement
from reftune.engine.positions import read_layout
from reftune.errors import ReftuneError
from reftune.training.loss import completion_loss, reps_loss, row_log_probs
from reftune.training.supervised_logits import SupervisedLogits, plain_model, supervised_forward

Forward = Callable[[nn.Module, dict[str, Any]], SupervisedLogits]
TOP, SPARSITY = 8, 0.005
"""ReFT-r1's k, and the weight that its penalty reaches at the end, as the paper's code sets them for Gemma-2-2B."""
_KEPT = 0.9


@dataclass(frozen=True)
class _Placed:
    placement: Placement
    edits: list[nn.Module]


def _placed(model: nn.Module) -> list[_Placed]:
    """The edits that act on a model now."""
    engine = plain_model(model).__dict__.get(ENGINE)
    found = [
        _Placed(layer.placements[name], [edit for _, edit in layer.parts(name)])
        for layer in (engine.interventions.values() if engine is not None else ())
        for name in layer.active_names()
    ]
    if not found:
        raise ReftuneError("An objective on pairs trains ReFT edits, and this model has none.")
    return found


@contextmanager
def at_strength(model: nn.Module, factor: float, *, nulled: bool = False) -> Iterator[None]:
    """Let the edits act so strongly, for the length of a ``with`` block; **changes them meanwhile**.

    Args:
        model: with ReFT edits.
        factor: on what they add; 0 is the base model.
        nulled: let those that can (`LobireftEdit`) take their direction out instead.
    """
    placed = _placed(model)
    before = [item.placement.scale for item in placed]
    try:
        for item in placed:
            nulls = nulled and all(isinstance(edit, LobireftEdit) for edit in item.edits)
            item.placement.scale = 1.0 if nulls else factor
            _let_null(item.edits, nulls)
        yield
    finally:
        for item, scale in zip(placed, before, strict=True):
            item.placement.scale = scale
            _let_null(item.edits, False)


def _let_null(edits: Sequence[nn.Module], nulls: bool) -> None:
    for edit in edits:
        if isinstance(edit, LobireftEdit):
            edit.nulls = nulls


def reps(
    model: nn.Module, inputs: dict[str, Any], forward: Forward, factors: Sequence[float]
) -> tuple[Float[Tensor, " pairs"], Any]:
    """The RePS loss of each pair, and the model's output under the edit.

    One factor is drawn of those given for each batch (in evaluation it is the middle one). Nulled, a `lobireft` edit
    takes its direction out; another acts the other way round.

    Args:
        model: with ReFT edits.
        inputs: a batch of `CompletionCollator`, of pairs.
        forward: gives supervised logits.
        factors: strengths of the edit.
    """
    count = len(inputs["labels"])
    drawn = int(torch.randint(len(factors), ())) if model.training else len(factors) // 2
    factor = sorted(factors)[drawn]

    def answers() -> tuple[Tensor, Tensor, Any]:
        found = forward(model, inputs)
        summed, tokens = row_log_probs(found.logits, found.targets, found.rows, count)
        return summed.view(2, -1), tokens.view(2, -1), found.outputs

    with torch.no_grad(), at_strength(model, 0.0):
        base, tokens, _ = answers()
    with at_strength(model, -factor, nulled=True):
        nulled, _, _ = answers()
    with at_strength(model, factor):
        steered, _, outputs = answers()
    return reps_loss(steered, nulled, base, tokens), outputs


class ReftR1:
    """ReFT-r1: one unit vector w at one layer detects what it writes.

    A state h of an edited token has the activation a = relu(w h); the row's strength is the mean of its k largest ones,
    and that much of w is added at every edited token. The loss is that of both answers, and, rising over training to a
    weight of 0.005, a row's mean of the other activations. The edit that is saved adds the mean strength of the
    positive rows of the last batches: in evaluation it is an ordinary `lobireft` edit. Source: arXiv 2501.17148, and
    its code for the penalty's schedule.

    Args:
        model: with one `lobireft` edit of rank 1; **its bias is no longer trained**.
    """

    def __init__(self, model: nn.Module) -> None:
        placed = _placed(model)
        edit = placed[0].edits[0]
        if len(placed) > 1 or len(placed[0].edits) > 1 or not isinstance(edit, LobireftEdit) or edit.r != 1:
            raise ReftuneError("objective='reft-r1' trains one vector: one lobireft edit of rank 1, at one layer.")
        self.placement, self.edit = placed[0].placement, edit
        self.edit.bias.requires_grad_(False)
        self._strength: Tensor | None = None

    def __call__(
        self, model: nn.Module, inputs: dict[str, Any], items: int | Tensor | None, progress: float
    ) -> tuple[Float[Tensor, ""], Any]:
        """The loss of a batch in training, and the model's output.

        Args:
            model: the one given before, however wrapped.
            inputs: a batch of `CompletionCollator`, of pairs.
            items: as for `completion_loss`.
            progress: share of the training that is done.
        """
        base: Any = plain_model(model)
        found = token_arguments(inputs, "only", base)
        assert found is not None
        mask = read_layout(**found).selected(self.placement.positions)
        seen: list[tuple[Tensor, Tensor]] = []

        def passing(hidden: Tensor) -> Tensor:
            direction = self.edit.current_rotation(torch.float32)[0]
            strength, rest = activations(hidden, direction, mask)
            seen.append((strength, rest))
            return hidden + (mask * strength[:, None]).unsqueeze(-1).mul(direction).to(hidden.dtype)

        site = self.placement.site
        handle = edit_passing(base, site, passing)
        try:
            with at_strength(model, 0.0):
                answers = supervised_forward(model, inputs)
        finally:
            handle.remove()
        strength, rest = seen[0]
        self._strength = strength[: len(strength) // 2].detach().mean()
        share = 1.0 if items is None else answers.targets.numel() / items
        loss = completion_loss(answers.logits, answers.targets, num_items_in_batch=items)
        return loss + SPARSITY * progress * share * rest.mean(), answers.outputs

    @torch.no_grad()
    def keep_strength(self, *, first: bool) -> None:
        """Take the last batch's strength into what the edit adds; **changes its bias**, so call it after backward."""
        if self._strength is not None:
            kept = 0.0 if first else _KEPT
            self.edit.bias.mul_(kept).add_((1 - kept) * self._strength)
            self._strength = None


def activations(
    hidden: Float[Tensor, "batch sequence width"],
    direction: Float[Tensor, " width"],
    mask: Bool[Tensor, "batch sequence"],
) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
    """Of each row's relu(h w) at its edited tokens: the mean of the 8 largest, and the mean of all but them.

    Args:
        hidden: states.
        direction: w.
        mask: the edited tokens, at least one a row.
    """
    active = torch.relu(hidden.float() @ direction) * mask
    tokens = mask.sum(1)
    top = active.topk(min(TOP, active.shape[1]), dim=1).values.sum(1)
    return top / tokens.clamp(max=TOP), (active.sum(1) - top) / tokens
