"""Tutorial 4: the path of an indirect object through SmolLM2.

"When Mary and John went to the store, John gave a drink to" ends in Mary because John comes twice. Which state says so?
The second name is exchanged, "... Mary gave a drink to", and states of that run are put into the first, by layer and token,
by attention head, and along a path: from the repeated name, through the heads found, to the end.

    python examples/causal/indirect_object.py [folder for pictures]
"""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import torch

from reftune.causal.heat_map import HeatMap
from reftune.causal.interchange import Run, run, swap
from reftune.causal.locations import Location
from reftune.causal.models import indirect_object
from reftune.causal.models.indirect_object import sentence
from reftune.causal.patching import logit_difference, patch, patch_heads
from reftune.models import load

COUNT = 4
TOKENS = [
    "When",
    "name 1",
    "and",
    "name 2",
    "went",
    "to",
    "the",
    "place",
    ",",
    "name again",
    "gave",
    "a",
    "thing",
    "to",
]


def main(pictures: Path) -> tuple[HeatMap, HeatMap]:
    model, tokenizer = load("smollm2", dtype="float32", device="cpu")
    model.eval()
    causal, rng = indirect_object(), random.Random(0)

    # 1. Pairs of prompts that differ in who comes twice.
    bases: list[dict[str, Any]] = []
    while len(bases) < COUNT:
        inputs = causal.sample(rng)
        if len(tokenizer(sentence(inputs))["input_ids"]) == len(TOKENS):  # every name, place and thing one token
            bases.append(inputs)
    sources = [{**b, "subject": b["second"] if b["subject"] == b["first"] else b["first"]} for b in bases]

    def encode(settings: list[dict[str, Any]]) -> dict[str, Any]:
        found = tokenizer([sentence(setting) for setting in settings], return_tensors="pt")
        return {"input_ids": found["input_ids"], "logits_to_keep": 1}

    def names(settings: list[dict[str, Any]]) -> list[int]:
        return [tokenizer(" " + causal.run(setting)["answer"])["input_ids"][0] for setting in settings]

    base, source = encode(bases), encode(sources)
    differ = base["input_ids"] != source["input_ids"]
    assert differ.sum(-1).tolist() == [1] * COUNT
    repeated = int(differ[0].nonzero())
    last = len(TOKENS) - 1
    metric = logit_difference(names(sources), names(bases))
    with torch.no_grad():
        difference = metric(model(**base).logits)
    print(
        f"logit of the repeated name minus the other's: {difference.mean():.2f}; the other wins in {int((difference < 0).sum())}/{COUNT}"
    )
    assert bool((difference < 0).all())

    # 2. By layer and token: 0 is the base's answer, 1 the other.
    columns = [repeated, *range(repeated + 1, last + 1)]
    states = patch(model, base, source, metric, positions=columns, labels=[TOKENS[c] for c in columns])
    states.plot(pictures / "indirect_object_states.png")
    by_layer = states.values
    moved = next(i for i in range(len(by_layer)) if by_layer[i, -1] > 0.5)
    print(
        f"the repeated name's own state decides up to layer {int((by_layer[:, 0] > 0.5).nonzero().max())}, the last token's from {moved}"
    )
    assert float(by_layer[:4, 0].min()) >= 0.8 and float(by_layer[-3:, -1].min()) >= 0.8

    # 3. By head, at the last token.
    heads = patch_heads(model, base, source, metric, layers=list(range(max(0, moved - 8), len(by_layer))), position=-1)
    heads.plot(pictures / "indirect_object_heads.png")
    order = heads.values.flatten().argsort(descending=True)[:8].tolist()
    width = heads.values.shape[1]
    top = [(int(heads.rows[i // width]), i % width, float(heads.values.flatten()[i])) for i in order]
    print(
        "heads that move the answer at the last token:",
        ", ".join(f"{layer}.{head} ({value:.2f})" for layer, head, value in top),
    )

    # 4. Along the path: a run in which only the repeated name's state comes from the source, and of that run only what
    # these heads then write at the end.
    first = Run(base, (swap(Location("block_output", 3, repeated), source),))
    through = tuple(swap(Location(f"head_output[{head}]", layer, -1), first) for layer, head, _ in top)
    with torch.no_grad():
        low, high = metric(model(**base).logits), metric(model(**source).logits)
        share = ((metric(run(model, Run(base, through)).logits) - low) / (high - low)).mean()
    print(f"through these {len(top)} heads alone passes {share:.2f} of the whole effect")
    assert float(share) >= 0.6
    return states, heads


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "pictures"))
