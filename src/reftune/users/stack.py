"""Several users' edits at each site as one edit, and a step of AdamW that is each user's own."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from peft import get_peft_model_state_dict
from torch import Tensor, nn

from reftune.edits import Edit
from reftune.edits.base import compute_dtype, without_autocast
from reftune.engine.hooks import Engine
from reftune.errors import ReftuneError
from reftune.training.supervised_logits import plain_model


class OneForAll(Edit):
    """A copy of one edit in which every user has a bias, and all the rest in common.

    h + P^T(Wh + b_u): a row's directions, one a user, say whose bias b_u it takes. Source: PerFit (ICLR 2026), BOReFT
    (arXiv 2609.33722), with LoReFT's W - R for W.

    Args:
        edit: linear, with a bias of r numbers; every user starts with its.
        users: how many.

    Attributes:
        shared: the copy, whose own bias is zero and stays so.
        biases: (users, r).

    Raises:
        ReftuneError: an edit that is no such one.
    """

    def __init__(self, edit: nn.Module, users: int) -> None:
        if not isinstance(edit, Edit) or not edit.folds or type(edit).change is not Edit.change:
            raise ReftuneError(f"{edit} has no bias of its own to be each user's: take a linear edit, such as loreft")
        bias = dict(edit.named_parameters()).get("bias")
        if bias is None or bias.shape != (edit.r,):
            raise ReftuneError(f"{type(edit).__name__} has no bias of r numbers to be each user's: take loreft")
        super().__init__(edit.width, edit.r, dropout=edit.dropout)
        self.shared = copy.deepcopy(edit)
        self.shared.bias = nn.Parameter(torch.zeros_like(bias), requires_grad=False)
        self.biases = nn.Parameter(bias.detach().repeat(users, 1))
        self.r = users

    def delta(
        self, h: Float[Tensor, "*rows width"], directions: Float[Tensor, "*#rows r"] | None = None
    ) -> Float[Tensor, "*rows width"]:
        """As for ``Edit``; without ``directions`` no bias is added."""
        with without_autocast(h.device.type):
            x = h.to(compute_dtype(h))
            coordinates, basis = self.shared.coordinates(x)
            if directions is not None:
                coordinates = coordinates + directions.to(x.dtype) @ self.biases.to(x.dtype)
            return coordinates @ basis

    def mean(self) -> dict[str, Tensor]:
        """The tensors of the edit with the users' mean bias."""
        return {**self.shared.state_dict(), "bias": self.biases.detach().mean(0)}


class Stack:
    """Puts the edits of several users in place of a model's adapter, whose values each of them starts from.

    At each site one edit holds all of them: (users * r, width), a user's r rows below another's. A row of a batch tells
    by ``intervention_directions`` which of these directions are its own. **Changes the model** until ``remove``.

    Args:
        model: a PEFT model with one ReFT adapter.
        users: how many.
        shared: whether they share all but the bias (``OneForAll``).

    Attributes:
        parameters: the users' own by their names in the model, (users * n, ...).
        common: those that they share and that are trained, likewise.

    Raises:
        ReftuneError: edits that cannot be stacked.
    """

    def __init__(self, model: Any, users: int, shared: bool = False) -> None:
        self.model, self.users, self.name = model, users, model.active_adapter
        self._before: list[tuple[Any, nn.Module]] = []
        engine = Engine.of(plain_model(model))
        assert engine is not None
        found = [
            (edits, edits[self.name])
            for intervention in engine.interventions.values()
            for edits in (intervention.reft_edits, intervention.reft_suffix_edits)
            if self.name in edits
        ]
        for _, edit in found:
            if not isinstance(edit, Edit):
                raise ReftuneError(f"{type(edit).__name__} cannot be trained for many users at once: it is no Edit")
        several: list[Edit] = [
            OneForAll(edit, users) if shared else edit.stacked(users)  # type: ignore[operator]
            for _, edit in found
        ]
        for (edits, edit), made in zip(found, several, strict=True):
            self._before.append((edits, edit))
            edits[self.name] = made.train(edit.training)
        self.r, self.shared = several[0].r // users, shared
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.parameters = {name: p for name, p in trained.items() if not shared or name.endswith(".biases")}
        self.common = {name: p for name, p in trained.items() if name not in self.parameters}

    def directions(self, owners: Int[Tensor, " batch"]) -> Bool[Tensor, "batch directions"]:
        """Which directions act on each row of a batch, given whose rows they are."""
        mine = torch.nn.functional.one_hot(owners, self.users) == 1
        return mine.repeat_interleave(self.r, dim=1)

    def stacked_tensors(self) -> dict[str, Tensor]:
        """The users' own tensors, (users, ...), by the names that they have in an adapter's file."""
        found: dict[str, Tensor] = get_peft_model_state_dict(self.model, adapter_name=self.name)
        if self.shared:
            own = {name.removesuffix("es"): tensor for name, tensor in found.items() if name.endswith(".biases")}
            return {name: tensor.detach().cpu().clone() for name, tensor in own.items()}
        return {name: tensor.detach().cpu().unflatten(0, (self.users, -1)).clone() for name, tensor in found.items()}

    def remove(self, learnt: bool = False) -> None:
        """Put back the adapter's own edits: as they were, or with what was learnt in common and the mean bias."""
        for edits, edit in self._before:
            several = edits[self.name]
            if learnt and isinstance(several, OneForAll):
                edit.load_state_dict(several.mean())
            edits[self.name] = edit


class RowAdamW:
    """AdamW over stacked parameters, each user's rows by themselves: clipped, stepped and counted alone.

    The same arithmetic as ``torch.optim.AdamW`` after ``clip_grad_norm_`` on that user's parameters.

    Args:
        parameters: (users * n, ...) each.
        decayed: which of them weight decay applies to.
        users: how many.
        args: AdamW's settings and ``max_grad_norm``, as transformers names them.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decayed: Sequence[bool], users: int, args: Any) -> None:
        self.parameters, self.users, self.args = list(parameters), users, args
        self.sizes = [p.numel() // users for p in self.parameters]
        like = self.parameters[0]
        self.mean = like.new_zeros(users, sum(self.sizes))
        self.square = torch.zeros_like(self.mean)
        self.steps = like.new_zeros(users)
        self.decay = torch.cat(
            [like.new_full((n,), args.weight_decay * d) for n, d in zip(self.sizes, decayed, strict=True)]
        )

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps; its tensors may be written to."""
        return {"mean": self.mean, "square": self.square, "steps": self.steps}

    def rows(self, users: Int[Tensor, " some"] | slice = slice(None)) -> Float[Tensor, "some numbers"]:
        """A copy of the parameters of some users or of all, a user's in one row."""
        return torch.cat([p.detach().reshape(self.users, -1)[users] for p in self.parameters], dim=1)

    @torch.no_grad()
    def set_rows(self, users: Int[Tensor, " some"], values: Float[Tensor, "some numbers"]) -> None:
        """**Overwrites the parameters** of some users."""
        for parameter, part in zip(self.parameters, values.split(self.sizes, dim=1), strict=True):
            parameter.view(self.users, -1)[users] = part

    @torch.no_grad()
    def step(self, users: Int[Tensor, " some"], rates: Float[Tensor, " some"]) -> None:
        """**Steps the parameters** of some users and leaves the others', and their moments, alone; drops gradients.

        Args:
            users: who has gradients.
            rates: their learning rates.
        """
        args, rates = self.args, rates.unsqueeze(1)
        found = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        grads = torch.cat([grad.reshape(self.users, -1)[users] for grad in found], dim=1)
        if args.max_grad_norm:
            norms = torch.linalg.vector_norm(grads, dim=1, keepdim=True)
            grads = grads * (args.max_grad_norm / (norms + 1e-6)).clamp(max=1.0)
        self.steps[users] += 1
        count = self.steps[users].unsqueeze(1)
        mean = self.mean[users].lerp(grads, 1 - args.adam_beta1)
        square = self.square[users] * args.adam_beta2 + (1 - args.adam_beta2) * grads * grads
        self.mean[users], self.square[users] = mean, square
        root = square.sqrt() / (1 - args.adam_beta2**count).sqrt() + args.adam_epsilon
        values = self.rows(users) * (1 - rates * self.decay)
        self.set_rows(users, values - rates / (1 - args.adam_beta1**count) * mean / root)
        for parameter in self.parameters:
            parameter.grad = None
