"""The peer's side: runs in pyreft's environment and writes adapters, logits, generations and a loss curve.

Usage: python peer.py OUTPUT [SMOLLM2_FOLDER]
"""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from pathlib import Path

import numpy as np

warnings.filterwarnings("ignore")
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parent))

import cases  # noqa: E402  # pyright: ignore
import pyreft  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

logging.disable(logging.WARNING)
torch.set_num_threads(1)


def tiny_model():
    model = LlamaForCausalLM(LlamaConfig(**cases.MODEL))
    weights = cases.fill((n, tuple(p.shape)) for n, p in model.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(weights[name]))
    return model.eval()


def smollm2(folder: Path):
    config = json.loads((folder / "config.json").read_text())
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    for name in ("dtype", "transformers_version", "_model_name_or_path"):
        config.pop(name, None)
    from safetensors.torch import load_file

    model = LlamaForCausalLM(LlamaConfig(**config))
    missing = model.load_state_dict(load_file(folder / "model.safetensors"), strict=False).missing_keys
    model.tie_weights()
    assert set(missing) <= {"lm_head.weight"}, missing
    return model.eval()


def make(model, case, rank=cases.RANK):
    cls = getattr(pyreft, case["intervention"] + "Intervention")
    component, rows = case.get("component", "block_output"), []
    for layer in case["layers"] * (2 if case.get("untied") else 1):
        options = {"add_bias": case.get("add_bias", False), "act_fn": case.get("act_fn", "linear")}
        edit = cls(
            embed_dim=model.config.hidden_size, low_rank_dimension=rank, dropout=0.0, dtype=torch.float32, **options
        )
        with torch.no_grad():  # away from the initial values, so that every term shows
            for name, parameter in edit.named_parameters():
                if "original" not in name:
                    parameter.add_(0.3 * torch.randn_like(parameter))
        row = {"component": component, "low_rank_dimension": rank, "intervention": edit}
        if "%d" in component:
            row["component"] = component % layer
        else:
            row["layer"] = layer
        rows.append(row)
    reft = pyreft.get_reft_model(model, pyreft.ReftConfig(representations=rows))
    reft.eval()
    return reft


def unit_locations(locations):
    return {"sources->base": (None, [[one] for one in locations])}


def run_cases(out: Path):
    logits = {}
    for number, (name, case) in enumerate(cases.CASES.items()):
        torch.manual_seed(number)
        reft = make(tiny_model(), case)
        ids = torch.from_numpy(cases.tokens(number, 2, 7))
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        where = [[one] * 2 for one in cases.locations(case, 7)]
        with torch.no_grad():
            logits[name] = reft(batch, unit_locations={"sources->base": (None, where)})[1].logits.contiguous()
        with open(os.devnull, "w") as quiet:
            stdout, sys.stdout = sys.stdout, quiet
            reft.save(str(out / name))
            sys.stdout = stdout
    save_file(logits, out / "logits.safetensors")


def generations(model, case, prompts, new_tokens):
    reft = make(model, case, rank=4 if model.config.hidden_size > 100 else cases.RANK)
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        _, tokens = reft.generate(
            {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
            unit_locations=unit_locations(cases.locations(case, len(prompt))),
            intervene_on_prompt=True,
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=model.config.pad_token_id,
        )
        found.append(tokens[0, len(prompt) :].tolist())
    return reft, found


def run_generation(out: Path, smollm2_folder):
    torch.manual_seed(100)
    prompts = [cases.tokens(1000 + n, 1, 4 + n % 5)[0].tolist() for n in range(cases.PROMPTS)]
    case = cases.CASES["loreft_untied"]
    reft, found = generations(tiny_model(), case, prompts, 12)
    reft.save(str(out / "generation"))
    record = {"tiny": {"prompts": prompts, "tokens": found}}
    if smollm2_folder:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(smollm2_folder / "tokenizer.json"))
        words = ["a cat", "the sea", "bread", "rain", "a bridge", "gold", "a horse", "winter", "music", "a river"]
        texts = [f"<|im_start|>user\nTell me about {w}.<|im_end|>\n<|im_start|>assistant\n" for w in words]
        texts += [f"<|im_start|>user\nWhat is {w} for?<|im_end|>\n<|im_start|>assistant\n" for w in words]
        prompts = [tokenizer.encode(text).ids for text in texts]
        torch.manual_seed(7)
        reft, found = generations(smollm2(smollm2_folder), {"intervention": "Loreft", "layers": [8, 20]}, prompts, 16)
        reft.save(str(out / "generation_smollm2"))
        record["smollm2"] = {"prompts": prompts, "tokens": found}
    (out / "generations.json").write_text(json.dumps(record))


def run_training(out: Path):
    plan = cases.TRAINING
    torch.manual_seed(3)
    model = tiny_model()
    rows = [
        {
            "layer": layer,
            "component": "block_output",
            "low_rank_dimension": plan["rank"],
            "intervention": pyreft.LoreftIntervention(
                embed_dim=cases.HIDDEN, low_rank_dimension=plan["rank"], dtype=torch.float32
            ),
        }
        for layer in plan["layers"]
    ]
    reft = pyreft.get_reft_model(model, pyreft.ReftConfig(representations=rows))
    reft.save(str(out / "training_start"))
    bases = {
        f"{layer}": row["intervention"].rotate_layer.parametrizations.weight[0].base.clone().contiguous()
        for layer, row in zip(plan["layers"], rows, strict=True)
    }
    save_file(bases, out / "training_bases.safetensors")
    optimiser = torch.optim.AdamW(reft.get_trainable_parameters(), lr=plan["lr"], weight_decay=0.0)
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
    (out / "training.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    output = Path(sys.argv[1])
    output.mkdir(parents=True, exist_ok=True)
    assert isinstance(np.zeros(1), np.ndarray)
    run_cases(output)
    run_training(output)
    run_generation(output, Path(sys.argv[2]) if len(sys.argv) > 2 else None)
