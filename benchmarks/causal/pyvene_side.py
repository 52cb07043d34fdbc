"""The other side of the comparison: runs under pyvene 0.1.8 in its own environment, on weights and inputs from a folder."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pyvene as pv
import torch
from pyvene.models.gru.modelings_gru import GRUConfig, GRUForClassification
from pyvene.models.mlp.modelings_mlp import MLPConfig, MLPForClassification
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

torch.set_num_threads(1)
OPTIONS = {"pdrop": 0.0, "activation_function": "relu"}
BUILD = {
    "gpt2": lambda spec: GPT2LMHeadModel(GPT2Config(**spec)),
    "llama": lambda spec: LlamaForCausalLM(LlamaConfig(**spec)),
    "mlp": lambda s: MLPForClassification(MLPConfig(h_dim=s["width"], n_layer=s["layers"], num_classes=s["classes"], **OPTIONS)),
    "gru": lambda s: GRUForClassification(GRUConfig(h_dim=s["width"], n_layer=s["layers"], n_labels=s["classes"], pdrop=0.0)),
}  # fmt: skip
COMPONENT = {"head": "head_attention_value_output", "cell": "cell_output"}


def load(kind: str, folder: Path, spec: dict):
    model = BUILD[kind](spec[kind]).eval()
    state = load_file(folder / f"{kind}.safetensors")
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and all("attn" in name or "lm_head" in name for name in missing), (missing, unexpected)
    return model


def tensor(outputs):
    return outputs.logits if hasattr(outputs, "logits") else outputs[0]


def arguments(tensors: dict, kind: str, name: str) -> dict:
    key = "input_ids" if kind in ("gpt2", "llama") else "inputs_embeds"
    return {key: tensors[f"{kind}.{name}"]}


def places(case: dict, key: str, unit: str):
    rows = [[p if isinstance(p, list) else [p] for p in place[key]] for place in case["places"]]
    if unit == "h.pos":
        return [[[[place["head"]]] * len(place[key]), row] for place, row in zip(case["places"], rows, strict=True)]
    return rows


def parity(folder: Path, spec: dict) -> None:
    tensors, results = load_file(folder / "inputs.safetensors"), {}
    for kind in BUILD:
        model = load(kind, folder, spec)
        for case in spec["cases"]:
            if kind not in case["kinds"]:
                continue
            unit = {"head": "h.pos", "cell": "t"}.get(case["component"], "pos")
            component = COMPONENT.get(case["component"], case["component"])
            rank = case.get("rank")
            kinds = pv.LowRankRotatedSpaceIntervention if rank else pv.VanillaIntervention
            units = len(case["places"][0]["base"][0]) if isinstance(case["places"][0]["base"][0], list) else 1
            config = pv.IntervenableConfig(
                model_type=type(model),
                mode=case.get("mode", "parallel"),
                representations=[
                    pv.RepresentationConfig(place["layer"], component, unit, units, low_rank_dimension=rank)
                    for place in case["places"]
                ],
                intervention_types=kinds,
            )
            intervenable = pv.IntervenableModel(config, model)
            if rank:
                for intervention in intervenable.interventions.values():
                    intervention = intervention[0] if isinstance(intervention, (tuple, list)) else intervention
                    intervention.rotate_layer.weight = tensors[f"{kind}.rotation"].mT.contiguous()
            sources = [arguments(tensors, kind, f"source{i}") for i in range(len(case["places"]))]
            if case.get("mode") == "serial":
                where = {
                    "source_0->source_1": (spec_rows(case, 0, "source"), spec_rows(case, 0, "base")),
                    "source_1->base": (spec_rows(case, 1, "source"), spec_rows(case, 1, "base")),
                }
            else:
                where = {"sources->base": (places(case, "source", unit), places(case, "base", unit))}
            base = arguments(tensors, kind, "base")
            with torch.no_grad():
                if kind == "gru":  # pyvene 0.1.8 writes time steps of a batch of one alone
                    found = [
                        intervenable(
                            {k: v[row : row + 1] for k, v in base.items()},
                            [{k: v[row : row + 1] for k, v in source.items()} for source in sources],
                            {k: tuple([[w[row]] for w in side] for side in sides) for k, sides in where.items()},
                        )[1]
                        for row in range(len(case["places"][0]["base"]))
                    ]
                    results[f"{kind}.{case['name']}"] = torch.cat([tensor(each) for each in found])
                else:
                    results[f"{kind}.{case['name']}"] = tensor(intervenable(base, sources, where)[1]).contiguous()
    save_file(results, folder / "pyvene_outputs.safetensors")


def spec_rows(case: dict, index: int, key: str):
    return [[[p] for p in case["places"][index][key]]]


def sweep(folder: Path, spec: dict) -> None:
    """Every layer and position of a model, one source: an intervenable model a layer, a call a position."""
    tensors, results, seconds = load_file(folder / "sweep_inputs.safetensors"), {}, {}
    for kind in ("gpt2", "llama"):
        model = load(kind, folder / "sweep", spec["sweep"])
        base, source = ({"input_ids": tensors[name]} for name in ("base", "source"))
        batch, length = base["input_ids"].shape
        for component in ("block_output", "mlp_output"):
            times = []
            for _ in range(spec["repeats"]):
                values = []
                start = time.process_time()
                with torch.no_grad():
                    for layer in range(spec["sweep"]["layers"]):
                        config = pv.IntervenableConfig(
                            model_type=type(model),
                            representations=[pv.RepresentationConfig(layer, component, "pos", 1)],
                            intervention_types=pv.VanillaIntervention,
                        )
                        intervenable = pv.IntervenableModel(config, model)
                        for position in range(length):
                            _, found = intervenable(base, [source], {"sources->base": position})
                            last = found.logits[:, -1]
                            values.append(last[:, 5] - last[:, 7])
                times.append(time.process_time() - start)
            results[f"{kind}.{component}"] = torch.stack(values)
            seconds[f"{kind}.{component}"] = min(times)
    save_file(results, folder / "pyvene_sweep.safetensors")
    (folder / "pyvene_seconds.json").write_text(json.dumps(seconds))


def das(folder: Path, spec: dict) -> None:
    """Distributed alignment search on hierarchical equality, as in pyvene's introduction to it."""
    s = spec["das"]
    data = load_file(folder / "das.safetensors")
    model = MLPForClassification(MLPConfig(h_dim=s["width"], n_layer=s["layers"], num_classes=2, **OPTIONS)).eval()
    model.load_state_dict(load_file(folder / "das_mlp.safetensors"))
    found = {}
    for seed in s["seeds"]:
        torch.manual_seed(seed)
        half = s["width"] // 2
        place = pv.RepresentationConfig(
            s["layer"], "block_output", "pos", 1, subspace_partition=[[0, half], [half, s["width"]]],
            intervention_link_key=0,
        )  # fmt: skip
        config = pv.IntervenableConfig(
            model_type=type(model), representations=[place, place], intervention_types=pv.RotatedSpaceIntervention
        )
        intervenable = pv.IntervenableModel(config, model, use_fast=True)
        intervenable.disable_model_gradients()
        parameters, seen = [], set()
        for intervention in intervenable.interventions.values():
            intervention = intervention[0] if isinstance(intervention, (tuple, list)) else intervention
            for parameter in intervention.rotate_layer.parameters():
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    parameters.append(parameter)
        optimizer = torch.optim.Adam(parameters, lr=s["lr"])
        steps = s["epochs"] * -(-len(data["train.labels"]) // s["batch"])
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done, steps=steps: 1 - done / steps)

        def answer(
            part: str, index: torch.Tensor, active: tuple[bool, bool], intervenable=intervenable
        ) -> torch.Tensor:
            zero = [[0]] * len(index)
            sources = [
                {"inputs_embeds": data[f"{part}.source{v}"][index]} if on else None for v, on in enumerate(active)
            ]
            where = [zero if on else None for on in active]
            subspaces = [[[v]] * len(index) if on else None for v, on in enumerate(active)]
            base = {"inputs_embeds": data[f"{part}.base"][index]}
            return tensor(intervenable(base, sources, {"sources->base": (where, where)}, subspaces=subspaces)[1])

        def batches(part: str, shuffle: bool):
            for pattern in ((True, False), (False, True), (True, True)):
                index = (data[f"{part}.active"] == torch.tensor(pattern)).all(-1).nonzero().squeeze(-1)
                index = index[torch.randperm(len(index))] if shuffle else index
                for part_index in index.split(s["batch"]):
                    yield pattern, part_index

        start = time.process_time()
        for _ in range(s["epochs"]):
            order = list(batches("train", True))
            for number in torch.randperm(len(order)).tolist():
                pattern, index = order[number]
                loss = torch.nn.functional.cross_entropy(answer("train", index, pattern), data["train.labels"][index])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        seconds = time.process_time() - start
        with torch.no_grad():
            right = sum(
                int((answer("test", index, pattern).argmax(-1) == data["test.labels"][index]).sum())
                for pattern, index in batches("test", False)
            )
        found[str(seed)] = {"iia": right / len(data["test.labels"]), "seconds": seconds}
    (folder / "pyvene_das.json").write_text(json.dumps(found))


if __name__ == "__main__":
    where, what = Path(sys.argv[1]), sys.argv[2]
    {"parity": parity, "sweep": sweep, "das": das}[what](where, json.loads((where / "spec.json").read_text()))
