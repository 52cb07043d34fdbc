"""The other side of the comparison: runs under repeng 0.4.0 in its own environment, on a model and pairs from a folder."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from repeng import ControlVector, DatasetEntry
from transformers import AutoModelForCausalLM, AutoTokenizer

torch.set_num_threads(1)
folder = Path(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
tokenizer = AutoTokenizer.from_pretrained(folder / "model")
pairs = [DatasetEntry(one, other) for one, other in json.loads((folder / "pairs.json").read_text(encoding="utf-8"))]
began = time.process_time()
vector = ControlVector.train(model, tokenizer, pairs, batch_size=32, method="pca_diff")
(folder / "seconds.json").write_text(json.dumps(time.process_time() - began), encoding="utf-8")
np.savez(folder / "found.npz", **{str(layer): direction for layer, direction in vector.directions.items()})
