"""Side by side with pyvene 0.1.8: equal interchange outputs, equal accuracy of alignments, and time.

    python -m benchmarks.causal.against_pyvene /path/to/pyvene-environment/bin/python [parity|sweep|das ...]

pyvene needs an environment of its own: torch 2.13.0, transformers 4.45.1, numpy below 2.4, accelerate, datasets, and
`pip install --no-deps pyvene==0.1.8`. Weights and inputs go to it in a temporary folder; both sides use one
thread, and seconds are of processor time, so that other work on the machine does not count.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from benchmarks.causal.networks import Gru, Mlp, louder
from reftune.causal.accuracy import interchange_accuracy
from reftune.causal.actions import Subspace
from reftune.causal.aligned import Aligned
from reftune.causal.alignment import Das
from reftune.causal.counterfactuals import counterfactuals, factual
from reftune.causal.interchange import Run, run, swap, zero
from reftune.causal.interchange_data import encode_counterfactuals
from reftune.causal.locations import Location
from reftune.causal.models import hierarchical_equality
from reftune.causal.patching import logit_difference, patch
from reftune.causal.sweep import output_tensor
from reftune.causal.training import AlignOptions, align

torch.set_num_threads(1)
IDS = {"bos_token_id": 1, "eos_token_id": 2}
GPT2 = {**IDS, "vocab_size": 100, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
LLAMA = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip
SMALL = {"width": 16, "layers": 3, "classes": 4}
SPEC: dict[str, Any] = {"gpt2": GPT2, "llama": LLAMA, "mlp": SMALL, "gru": SMALL}
TRANSFORMERS = ["gpt2", "llama"]
CASES = [
    {"name": "one position, another in the source", "component": "block_output", "kinds": TRANSFORMERS,
     "places": [{"layer": 1, "base": [2, 5, 0], "source": [4, 1, 6]}]},
    {"name": "two positions at once", "component": "mlp_output", "kinds": TRANSFORMERS,
     "places": [{"layer": 2, "base": [[1, 3]] * 3, "source": [[0, 5]] * 3}]},
    {"name": "two sites and two sources", "component": "block_output", "kinds": TRANSFORMERS,
     "places": [{"layer": 0, "base": [2] * 3, "source": [2] * 3}, {"layer": 2, "base": [5] * 3, "source": [4] * 3}]},
    {"name": "a head", "component": "head", "kinds": TRANSFORMERS,
     "places": [{"layer": 1, "base": [3] * 3, "source": [3] * 3, "head": 2}]},
    {"name": "queries", "component": "query_output", "kinds": ["llama"],
     "places": [{"layer": 1, "base": [6] * 3, "source": [2] * 3}]},
    {"name": "a rotated subspace", "component": "block_output", "kinds": TRANSFORMERS, "rank": 5,
     "places": [{"layer": 1, "base": [3] * 3, "source": [3] * 3}]},
    {"name": "nested", "component": "block_output", "kinds": TRANSFORMERS, "mode": "serial",
     "places": [{"layer": 0, "base": [2] * 3, "source": [2] * 3}, {"layer": 1, "base": [4] * 3, "source": [4] * 3}]},
    {"name": "a layer of the MLP", "component": "block_output", "kinds": ["mlp"],
     "places": [{"layer": 1, "base": [0] * 3, "source": [0] * 3}]},
    {"name": "a subspace of the MLP", "component": "block_output", "kinds": ["mlp"], "rank": 5,
     "places": [{"layer": 0, "base": [0] * 3, "source": [0] * 3}]},
    {"name": "every step of the GRU's first layer", "component": "cell", "kinds": ["gru"],
     "places": [{"layer": 0, "base": [list(range(7))] * 3, "source": [list(range(7))] * 3}]},
    {"name": "the last step of the GRU", "component": "cell", "kinds": ["gru"],
     "places": [{"layer": 2, "base": [6] * 3, "source": [6] * 3}]},
    # pyvene 0.1.8 sets the state to zero at every step that is not swapped (`_reconcile_stateful_cached_activations`
    # fills them with zeros and the line that would restore them is commented out), so that is what it is compared with.
    {"name": "the GRU's last steps, others zero", "component": "cell", "kinds": ["gru"], "zero": [0, 1, 2],
     "places": [{"layer": 1, "base": [[3, 4, 5, 6]] * 3, "source": [[3, 4, 5, 6]] * 3}]},
]  # fmt: skip
HERE = Path(__file__).parent


def other_side(python: str, folder: Path, what: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [python, str(HERE / "pyvene_side.py"), str(folder), what], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"pyvene's side failed:\n{done.stderr[-3000:]}")


def build(kind: str, spec: dict[str, Any]) -> torch.nn.Module:
    if kind == "gpt2":
        return louder(tf.GPT2LMHeadModel(tf.GPT2Config(**spec)), 4.0).eval()
    if kind == "llama":
        return louder(tf.LlamaForCausalLM(tf.LlamaConfig(**spec)), 4.0).eval()
    return (Mlp if kind == "mlp" else Gru)(spec["width"], spec["layers"], spec["classes"]).eval()


def save(model: torch.nn.Module, path: Path) -> None:
    save_file({name: value.contiguous().clone() for name, value in model.state_dict().items()}, path)


def location(kind: str, case: dict[str, Any], place: dict[str, Any], key: str) -> Location:
    component = case["component"]
    if kind in ("mlp", "gru"):
        path = "mlp.h.{layer}" if kind == "mlp" else "gru.cells.{layer}"
        return Location(path, place["layer"], torch.tensor(place[key]))
    component = f"head_output[{place['head']}]" if component == "head" else component
    return Location(component, place["layer"], torch.tensor(place[key]))


def parity(python: str, folder: Path) -> None:
    spec, tensors, models = {**SPEC, "cases": CASES}, {}, {}
    for kind in SPEC:
        torch.manual_seed(0)
        models[kind] = build(kind, SPEC[kind])
        save(models[kind], folder / f"{kind}.safetensors")
        width = 32 if kind in TRANSFORMERS else SMALL["width"]
        for name in ("base", "source0", "source1"):
            shape = (3, 1 if kind == "mlp" else 7)
            tensors[f"{kind}.{name}"] = (
                torch.randint(3, 99, shape) if kind in TRANSFORMERS else torch.randn(*shape, width)
            )
        tensors[f"{kind}.rotation"] = torch.linalg.qr(torch.randn(width, width)).Q[:5].contiguous()
    (folder / "spec.json").write_text(json.dumps(spec))
    save_file(tensors, folder / "inputs.safetensors")
    other_side(python, folder, "parity")
    theirs = load_file(folder / "pyvene_outputs.safetensors")
    worst = 0.0
    for case in CASES:
        for kind in case["kinds"]:
            key = "input_ids" if kind in TRANSFORMERS else "inputs_embeds"
            base = {key: tensors[f"{kind}.base"]}
            sources: list[Any] = [{key: tensors[f"{kind}.source{i}"]} for i in range(len(case["places"]))]
            subspace = Subspace(tensors[f"{kind}.rotation"]) if "rank" in case else None
            if case.get("mode") == "serial":
                first = case["places"][0]
                low = swap(location(kind, case, first, "base"), sources[0], location(kind, case, first, "source"))
                swaps = [(case["places"][1], Run(sources[1], (low,)))]
            else:
                swaps = list(zip(case["places"], sources, strict=True))
            what = tuple(
                swap(location(kind, case, p, "base"), source, location(kind, case, p, "source"), subspace)
                for p, source in swaps
            )
            if "zero" in case:
                what += (zero(Location("gru.cells.{layer}", 1, case["zero"])),)
            with torch.no_grad():
                ours = output_tensor(run(models[kind], Run(base, what)))
                moved = float((ours - output_tensor(models[kind](**base))).abs().max())
            gap = float((ours - theirs[f"{kind}.{case['name']}"]).abs().max())
            worst = max(worst, gap)
            print(f"{kind:6} {case['name']:36} difference {gap:.1e}   (the intervention moves outputs by {moved:.2f})")
            assert gap <= 1e-5 and moved > 5e-3, (kind, case["name"], gap, moved)
    print(f"interchange outputs: greatest difference {worst:.1e} (bar: 1e-5)\n")


def sweep(python: str, folder: Path) -> None:
    layers, repeats = 8, 3
    gpt2 = {**GPT2, "n_embd": 128, "n_layer": layers}
    llama = {**LLAMA, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": layers}
    spec = {"sweep": {"gpt2": gpt2, "llama": llama, "layers": layers}, "repeats": repeats}
    (folder / "sweep").mkdir()
    models = {}
    for kind in TRANSFORMERS:
        torch.manual_seed(0)
        models[kind] = build(kind, spec["sweep"][kind])
        save(models[kind], folder / "sweep" / f"{kind}.safetensors")
    inputs = {name: torch.randint(3, 99, (8, 16)) for name in ("base", "source")}
    save_file(inputs, folder / "sweep_inputs.safetensors")
    (folder / "spec.json").write_text(json.dumps(spec))
    other_side(python, folder, "sweep")
    theirs = load_file(folder / "pyvene_sweep.safetensors")
    seconds = json.loads((folder / "pyvene_seconds.json").read_text())
    metric = logit_difference([5] * 8, [7] * 8)
    cells = layers * 16
    ratios = []
    for kind in TRANSFORMERS:
        base, source = ({"input_ids": inputs[name]} for name in ("base", "source"))
        for component in ("block_output", "mlp_output"):
            times = []
            for _ in range(repeats):
                start = time.process_time()
                found = patch(models[kind], base, source, metric, component=component, relative=False)
                times.append(time.process_time() - start)
            gap = float((found.per_row.flatten(0, 1) - theirs[f"{kind}.{component}"]).abs().max())
            ours, other = min(times), seconds[f"{kind}.{component}"]
            ratios.append(other / ours)
            print(
                f"{kind:6} {component:12} {cells} cells of 8 rows: reftune {1e3 * ours / cells:.2f} ms a batch, "
                f"pyvene {1e3 * other / cells:.2f} ms a batch, ratio {other / ours:.1f}; difference {gap:.1e}"
            )
            assert gap <= 1e-4, gap
    print(f"sweeps of layer x position: at least {min(ratios):.1f} times faster (bar: 2)\n")
    assert min(ratios) >= 2


def das(python: str, folder: Path) -> None:
    width, entities, seeds = 64, 2000, [0, 1, 2]
    options = {"width": width, "layers": 3, "layer": 0, "lr": 1e-2, "epochs": 8, "batch": 128, "seeds": seeds}
    torch.manual_seed(0)
    causal, table = hierarchical_equality(entities), torch.rand(entities, width // 4) * 2 - 1

    def encode(settings: Any) -> dict[str, torch.Tensor]:
        index = torch.tensor([[s[name] for name in "wxyz"] for s in settings])
        return {"inputs_embeds": table[index].flatten(1)[:, None]}

    settings = factual(causal, 60_000, seed=1)
    inputs, labels = encode(settings)["inputs_embeds"], torch.tensor([int(s["same"]) for s in settings])
    model = Mlp(width, 3, 2)
    steps = 20 * (len(inputs) // 1000)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    for _ in range(20):
        for index in torch.randperm(len(inputs)).split(1000):
            loss = torch.nn.functional.cross_entropy(model(inputs[index]), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()
    with torch.no_grad():
        held_out = factual(causal, 2000, seed=2)
        right = model(**encode(held_out)).argmax(-1) == torch.tensor([int(s["same"]) for s in held_out])
    print(f"the MLP answers {float(right.float().mean()):.3f} of held-out inputs rightly")
    names, made = ["left", "right"], {}
    for part, count, seed in (("train", 8000, 3), ("test", 2000, 4)):
        examples = counterfactuals(causal, count, names, seed=seed)
        made[part] = encode_counterfactuals(examples, names, encode, lambda s: int(s["same"]))
    tensors = {}
    for part, d in made.items():
        tensors[f"{part}.base"] = d.base["inputs_embeds"]
        tensors.update({f"{part}.source{v}": d.sources[name]["inputs_embeds"] for v, name in enumerate(names)})
        tensors.update({f"{part}.active": d.active, f"{part}.labels": d.labels})
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "das.safetensors")
    save(model, folder / "das_mlp.safetensors")
    (folder / "spec.json").write_text(json.dumps({"das": options}))
    other_side(python, folder, "das")
    theirs = json.loads((folder / "pyvene_das.json").read_text())
    gaps = []
    for seed in seeds:
        torch.manual_seed(seed)
        aligned = Aligned(Location("mlp.h.{layer}", 0), Das({"left": width // 2, "right": width // 2}, width))
        start = time.process_time()
        how = AlignOptions(epochs=options["epochs"], batch_size=options["batch"], lr=options["lr"], seed=seed)
        align(model, aligned, made["train"], how)
        seconds = time.process_time() - start
        found, other = interchange_accuracy(model, aligned, made["test"]).overall, theirs[str(seed)]
        gaps.append(found - other["iia"])
        print(f"seed {seed}: IIA reftune {found:.3f}, pyvene {other['iia']:.3f}; "
              f"training {seconds:.1f} s and {other['seconds']:.1f} s")  # fmt: skip
    mean = sum(gaps) / len(gaps)
    print(f"hierarchical equality: IIA differs by {mean:+.3f} on average\n")
    assert mean > -0.02, gaps


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    for name in sys.argv[2:] or ["parity", "sweep", "das"]:
        with tempfile.TemporaryDirectory() as scratch:
            {"parity": parity, "sweep": sweep, "das": das}[name](sys.argv[1], Path(scratch))
