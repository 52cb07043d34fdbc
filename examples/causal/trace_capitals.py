"""Tutorial 2: where does a language model look up a country's capital?

Causal tracing on "The capital of France is": noise on the country's embedding takes "Paris" away; one clean state at a
time is put back, and where the answer comes back, the fact passes. Then the same with MLP and attention outputs in windows
of layers, and activation patching between two countries with its first-order estimate.

    python examples/causal/trace_capitals.py [folder for pictures]
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch

from reftune.causal.attribution import Agreement, agreement, attribution_patch
from reftune.causal.heat_map import HeatMap
from reftune.causal.patching import logit_difference, patch
from reftune.causal.tracing import Trace, trace
from reftune.models import load

CAPITALS = {"France": "Paris", "Japan": "Tokyo", "Germany": "Berlin", "Greece": "Athens", "China": "Beijing",
            "Sweden": "Stockholm", "Kenya": "Nairobi", "Austria": "Vienna"}  # fmt: skip
TOKENS = ["The", "capital", "of", "country", "is"]
COUNTRY, LAST = 3, 4


def main(pictures: Path) -> tuple[dict[str, Trace], Agreement]:
    model, tokenizer = load("smollm2", dtype="float32", device="cpu")
    model.eval()

    def ask(countries: list[str]) -> dict[str, Any]:
        found = tokenizer([f"The capital of {country} is" for country in countries], return_tensors="pt")
        assert found["input_ids"].shape[1] == len(TOKENS), "each country is one token"
        return {"input_ids": found["input_ids"], "logits_to_keep": 1}

    def first_token(words: list[str]) -> list[int]:
        return [tokenizer(f" {word}")["input_ids"][0] for word in words]

    # 1. The model knows these: the capital is what it says next.
    countries, capitals = list(CAPITALS), list(CAPITALS.values())
    answers = first_token(capitals)
    with torch.no_grad():
        said = model(**ask(countries)).logits[:, -1].argmax(-1)
    assert said.tolist() == answers, [tokenizer.decode(token) for token in said]

    # 2. Causal tracing. The states of the country's token carry the fact through the lower layers, the last token's through
    # the upper ones.
    traces: dict[str, Trace] = {}
    for component, window in (("block_output", 1), ("mlp_output", 6), ("attention_output", 6)):
        start = time.perf_counter()
        traces[component] = trace(
            model, ask(countries), answers, COUNTRY, component=component, window=window, labels=TOKENS, samples=2
        )
        found = traces[component]
        layer, token, value = found.heat_map.best()
        print(
            f"{component:17} clean {found.clean:.2f}, with noise {found.corrupted:.3f}; most comes back at layer {layer}, "
            f"{token!r}: {value:.2f} ({time.perf_counter() - start:.0f} s)"
        )
    drawn = [found.heat_map for found in traces.values()]
    for component, heat_map in zip(traces, drawn, strict=True):
        heat_map.plot(pictures / f"trace_{component}.png", drawn[0].limits(*drawn[1:]))
    states = traces["block_output"]
    values, layers = states.heat_map.values, len(states.heat_map.rows)
    assert states.clean >= 0.4 and states.corrupted <= 0.1
    assert float(values[: layers // 3, COUNTRY].min()) >= 0.7 * states.clean, "low layers hold it at the country"
    assert float(values[-layers // 5 :, LAST].min()) >= 0.8 * states.clean, "high layers hold it at the last token"
    assert float(values[:, :COUNTRY].max()) <= 0.1, "nothing before the country does"
    handed_over = next(i for i in range(layers) if values[i, LAST] > values[i, COUNTRY])
    print(f"the fact is handed over from the country to the last token at layer {handed_over}")

    # 3. Patching one country into another's prompt, exactly and to first order.
    others = countries[1:] + countries[:1]
    metric = logit_difference(first_token([CAPITALS[c] for c in others]), answers)
    maps: list[HeatMap] = []
    for method in (patch, attribution_patch):
        start = time.process_time()
        maps.append(method(model, ask(countries), ask(others), metric, component="mlp_output", labels=TOKENS))
        print(f"{method.__name__:18} {time.process_time() - start:.1f} s of processor time")
    for method, heat_map in zip((patch, attribution_patch), maps, strict=True):
        heat_map.plot(pictures / f"capitals_{method.__name__}.png", maps[0].limits(maps[1]))
    found = agreement(*maps)
    print(
        f"first order against exact: Pearson {found.pearson:.2f}, ranks {found.spearman:.2f}, top tenth {found.top:.0%}"
    )
    assert found.pearson >= 0.7
    return traces, found


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "pictures"))
