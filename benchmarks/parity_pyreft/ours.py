"""Our side of the comparison: loads what the peer saved and computes the same numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.parity_pyreft import cases
from reftune import pyreft


def tiny_model() -> Any:
    """The peer's tiny model, weight for weight."""
    model: Any = LlamaForCausalLM(LlamaConfig(**cases.MODEL))
    weights = cases.fill((n, tuple(p.shape)) for n, p in model.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(weights[name]))
    return model.eval()


def logits_of(name: str, folder: Path) -> Tensor:
    """The logits (2, 7, vocabulary) of a case's adapter, loaded from the folder that pyreft wrote."""
    case = cases.CASES[name]
    reft = pyreft.ReftModel.load(folder / name, tiny_model())
    if act_fn := case.get("act_fn"):  # pyreft does not save it
        for edit in reft.interventions.values():
            fresh: Any = type(edit)(embed_dim=cases.HIDDEN, low_rank_dimension=cases.RANK, act_fn=act_fn)
            edit.__dict__["_activation"], edit.__dict__["act_fn"] = fresh.__dict__["_activation"], act_fn
    reft.eval()
    ids = torch.from_numpy(cases.tokens(list(cases.CASES).index(name), 2, 7))
    where = [[one] * 2 for one in cases.locations(case, 7)]
    with torch.no_grad():
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return reft(batch, unit_locations={"sources->base": (None, where)})[1].logits


def expected_logits(folder: Path) -> dict[str, Tensor]:
    """The peer's logits by case."""
    return load_file(folder / "logits.safetensors")


def generations_of(folder: Path, model: Any, case: dict[str, Any], prompts: list[list[int]], new_tokens: int) -> Any:
    """Greedy continuations of the prompts under the adapter that pyreft wrote to ``folder``."""
    reft = pyreft.ReftModel.load(folder, model)
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        _, tokens = reft.generate(
            {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
            unit_locations={"sources->base": (None, [[one] for one in cases.locations(case, len(prompt))])},
            intervene_on_prompt=True,
            max_new_tokens=new_tokens,
            do_sample=False,
        )
        found.append(tokens[0, len(prompt) :].tolist())
    return found


def loss_curve(folder: Path, parametrization: str) -> list[float]:
    """The losses of the training plan from the peer's initial weights."""
    plan = cases.TRAINING
    start = pyreft.ReftModel.load(folder / "training_start", tiny_model())
    bases = load_file(folder / "training_bases.safetensors")
    rows = []
    for layer, trained in zip(plan["layers"], list(start.interventions.values()), strict=True):
        edit: Any = pyreft.LoreftIntervention(
            embed_dim=cases.HIDDEN, low_rank_dimension=plan["rank"], parametrization=parametrization
        )
        edit.load_state_dict(trained.state_dict())
        if parametrization == "householder":  # the rest of the basis is drawn at random there, and steers the optimiser
            edit.current_rotation(torch.float32)
            edit.basis.copy_(bases[str(layer)])
        rows.append({"layer": layer, "component": "block_output", "intervention": edit})
    reft = pyreft.get_reft_model(tiny_model(), pyreft.ReftConfig(representations=rows)).train()
    trained_now = [p for p in reft.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained_now, lr=plan["lr"], weight_decay=0.0)
    losses = []
    for step in range(plan["steps"]):
        ids = torch.from_numpy(cases.tokens(step % 3, plan["rows"], plan["length"]))
        labels = ids.clone()
        labels[:, : plan["prompt"]] = -100
        where = [[[plan["prompt"] - 1]] * plan["rows"]] * len(plan["layers"])
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        loss = reft(batch, unit_locations={"sources->base": (None, where)}, labels=labels)[1].loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


def expected_losses(folder: Path) -> list[float]:
    """The peer's losses."""
    return json.loads((folder / "training.json").read_text(encoding="utf-8"))


def expected_generations(folder: Path) -> dict[str, dict[str, Any]]:
    """The peer's prompts and continuations, by model."""
    return json.loads((folder / "generations.json").read_text(encoding="utf-8"))
