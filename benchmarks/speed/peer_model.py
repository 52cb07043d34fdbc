"""What the peers' workers share. It is imported in their own old environments, so it needs nothing of ours."""

from __future__ import annotations

import json
import time
from pathlib import Path

from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback


def smollm2(folder):
    """The bundled model as an older transformers reads it."""
    config = json.loads((Path(folder) / "config.json").read_text())
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    for name in ("dtype", "transformers_version", "_model_name_or_path"):
        config.pop(name, None)
    model = LlamaForCausalLM(LlamaConfig(**config))
    missing = model.load_state_dict(load_file(Path(folder) / "model.safetensors"), strict=False).missing_keys
    model.tie_weights()
    assert set(missing) <= {"lm_head.weight"}, missing
    return model


class EpochClock(TrainerCallback):
    """Seconds of each epoch."""

    def __init__(self):
        self.seconds = []

    def on_epoch_begin(self, *_, **__):
        self.begin = time.perf_counter()

    def on_epoch_end(self, *_, **__):
        self.seconds.append(time.perf_counter() - self.begin)
