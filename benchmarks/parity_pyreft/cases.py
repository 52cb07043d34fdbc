"""What is compared, in words that both environments understand; imports nothing but numpy."""

from __future__ import annotations

from typing import Any

import numpy as np

HIDDEN, VOCAB, LAYERS, RANK = 16, 32, 3, 2
MODEL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
INTERVENTIONS = ("Loreft", "Noreft", "Consreft", "Lobireft", "Direft", "Nodireft")

CASES: dict[str, dict[str, Any]] = {
    **{name.lower(): {"intervention": name, "layers": [1]} for name in INTERVENTIONS},
    **{f"{name.lower()}_untied": {"intervention": name, "layers": [0, 2], "untied": True} for name in INTERVENTIONS},
    "loreft_relu": {"intervention": "Loreft", "layers": [1], "act_fn": "relu"},
    "noreft_bias": {"intervention": "Noreft", "layers": [1], "add_bias": True},
    "nodireft_bias": {"intervention": "Nodireft", "layers": [1], "add_bias": True},
    "loreft_mlp": {"intervention": "Loreft", "layers": [0, 1, 2], "component": "mlp_output"},
    "loreft_path": {"intervention": "Loreft", "layers": [0, 2], "component": "model.layers[%d].output"},
}
"""Adapters; positions are f2+l2, tied unless said otherwise."""

GOLDEN = ("loreft", "noreft", "consreft", "lobireft", "direft", "nodireft", "loreft_path", "noreft_bias")
"""The cases whose files are kept with the tests."""


def fill(named: Any) -> dict[str, np.ndarray]:
    """Weights for a model's parameters, the same in every version of every library.

    Args:
        named: pairs of name and shape.
    """
    found = {}
    for name, shape in sorted(named):
        seed = sum(ord(letter) * (index + 1) for index, letter in enumerate(name))
        values = np.random.RandomState(seed).standard_normal(shape) * (0.1 if len(shape) == 1 else 0.35)
        found[name] = (values + (1.0 if "norm" in name else 0.0)).astype(np.float32)
    return found


def tokens(seed: int, rows: int, length: int) -> np.ndarray:
    """Token ids without special tokens."""
    return np.random.RandomState(seed).randint(3, VOCAB, (rows, length))


def locations(case: dict[str, Any], length: int) -> list[list[int]]:
    """The tokens that each intervention edits, f2+l2, in pyreft's order."""
    first, last = [0, 1], [length - 2, length - 1]
    if case.get("untied"):
        return [first] * len(case["layers"]) + [last] * len(case["layers"])
    return [first + last] * len(case["layers"])


TRAINING = {"layers": [0, 2], "steps": 30, "lr": 4e-3, "rows": 4, "length": 9, "prompt": 6, "rank": RANK}
"""One LoReFT edit a layer, at l1, on one batch a step out of three."""

PROMPTS = 20
