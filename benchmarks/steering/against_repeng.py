"""Side by side with repeng 0.4.0: the same principal components on the same pairs, and time.

    python -m benchmarks.steering.against_repeng /path/to/repeng-environment/bin/python

repeng needs an environment of its own: torch 2.13.0 and `pip install repeng==0.4.0`. Model and pairs go to it in a
temporary folder; both sides use one thread, and seconds are of processor time, so that other work on the machine does
not count. repeng takes the last layer's states behind the final norm, where nothing is edited: that layer is left out.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import reftune
from benchmarks.steering.pairs import texts
from reftune.data.formats import LabelledText
from reftune.data.tokenising import Encoding
from reftune.engine.position_grammar import parse_positions
from reftune.engine.sites import find_sites
from reftune.steering.directions import find_directions
from reftune.steering.states import mean_states

torch.set_num_threads(1)


def main(python: str) -> None:
    model, tokenizer = reftune.models.load("smollm2", device="cpu", dtype="float32")
    pairs, sites = texts(), find_sites(model, "block_output", "all")
    began = time.process_time()
    rows = [LabelledText(text, 0) for side in zip(*pairs, strict=True) for text in side]
    encoded = Encoding(tokenizer).dataset(rows).to_list()
    with mean_states(model, encoded, sites, parse_positions("l1"), tokenizer.pad_token_id, 32) as states:
        one, other = states[: len(pairs)], states[len(pairs) :]
        ours = [
            find_directions(one[:, place], other[:, place], estimator="pca", paired=True).basis[0]
            for place in range(len(sites))
        ]
    seconds = time.process_time() - began
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(Path(folder) / "model")
        tokenizer.save_pretrained(Path(folder) / "model")
        Path(folder, "pairs.json").write_text(json.dumps(pairs), encoding="utf-8")
        one_thread = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        command = [python, str(Path(__file__).with_name("repeng_side.py")), folder]
        subprocess.run(
            command, check=True, env={key: value for key, value in one_thread.items() if key != "PYTHONPATH"}
        )
        theirs = np.load(Path(folder) / "found.npz")
        peer_seconds = float(json.loads(Path(folder, "seconds.json").read_text(encoding="utf-8")))
    cosines = {
        int(name): float(ours[int(name)] @ theirs[name] / np.linalg.norm(theirs[name]))
        for name in theirs.files
        if int(name) < len(sites) - 1
    }
    worst = min(cosines, key=lambda layer: abs(cosines[layer]))
    turned = [layer for layer, cosine in cosines.items() if cosine < 0]
    print(f"{len(pairs)} pairs, {len(cosines)} layers of smollm2")
    print(f"largest 1 - |cosine|: {1 - abs(cosines[worst]):.2e} (layer {worst}); of another sign: {turned or 'none'}")
    lengths = [float(np.linalg.norm(theirs[name])) for name in theirs.files]
    print(
        f"length of repeng's vectors: {min(lengths):.4f} to {max(lengths):.4f} (ours: unit, and a distance beside it)"
    )
    print(f"processor seconds: reftune {seconds:.1f}, repeng {peer_seconds:.1f}")


if __name__ == "__main__":
    main(sys.argv[1])
