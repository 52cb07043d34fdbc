"""What a store of users costs: seconds to open, milliseconds to read a user, bytes a user, memory of the process.

::

    python -m benchmarks.many_users.store [--folder DIR] [--users 10000] [--shared-users 1000000]

Edits of SmolLM2-135M (width 576), random: LoReFT r = 4 of layer 8 in float32, a whole edit a user; and LoReFT r = 4 of
all 30 layers with a shared rotation and weight, one bias a user, in half precision and in float32. Reading is measured in
a process of its own, which opens the store and reads users in random order; nothing is warm but the system's page cache.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch

from reftune.users.store import UserStore

WIDTH, RANK, LAYERS = 576, 4, 30
KEY = "base_model.model.model.layers.{}.intervention.reft_edits.{}"
SHAPES = {"rotation": (RANK, WIDTH), "weight": (RANK, WIDTH), "bias": (RANK,)}
READS = 1000


def config(layers: list[int]) -> dict[str, object]:
    return {
        "peft_type": "REFT", "task_type": "CAUSAL_LM", "method": "loreft", "r": RANK, "layers_to_transform": layers,
        "component": "block_output", "positions": "l1+generated", "share_weights": True, "act_fn": None,
    }  # fmt: skip


def drawn(layers: list[int], names: tuple[str, ...], users: int | None, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    rows = () if users is None else (users,)
    return {KEY.format(i, name): torch.randn(*rows, *SHAPES[name]).to(dtype) for i in layers for name in names}


def fill(folder: Path, users: int, shared: bool, dtype: torch.dtype) -> float:
    """Write a store in parts of 10,000 users; returns the seconds."""
    layers = list(range(LAYERS)) if shared else [8]
    store = UserStore.create(folder, config(layers), "smollm2")
    begin = time.perf_counter()
    if shared:
        store.write_shared(drawn(layers, ("rotation", "weight"), None, dtype))
    for start in range(0, users, 10_000):
        names = [f"user-{i:07}" for i in range(start, min(users, start + 10_000))]
        store.write_stacked(names, drawn(layers, ("bias",) if shared else tuple(SHAPES), len(names), dtype))
    return time.perf_counter() - begin


def measure(folder: str) -> None:
    """Open and read, and print figures as JSON: run in a process of its own."""
    before = psutil.Process().memory_info().rss
    begin = time.perf_counter()
    store = UserStore.open(folder)
    count = len(store)
    opened = time.perf_counter() - begin
    picked = [f"user-{i:07}" for i in random.Random(0).sample(range(count), min(READS, count))]
    seconds = []
    for name in picked:
        begin = time.perf_counter()
        store.read(name)
        seconds.append(time.perf_counter() - begin)
    memory = psutil.Process().memory_info().rss - before
    begin = time.perf_counter()
    store.names()
    listed = time.perf_counter() - begin
    begin = time.perf_counter()
    store.write({picked[0]: {k: t for k, t in store.read(picked[1]).items() if not store.has_shared or "bias" in k}})
    replaced = time.perf_counter() - begin
    print(
        json.dumps(
            {
                "open_s": opened, "list_s": listed, "read_ms": 1000 * statistics.median(seconds),
                "read_ms_99": 1000 * sorted(seconds)[int(0.99 * len(seconds))], "replace_ms": 1000 * replaced,
                "memory_MB": memory / 1e6,
            }
        )
    )  # fmt: skip


def figures(folder: Path, users: int, shared: bool, dtype: torch.dtype) -> dict[str, float]:
    written = fill(folder, users, shared, dtype)
    command = [sys.executable, "-m", "benchmarks.many_users.store", "--measure", str(folder)]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    disk = {path.name: path.stat().st_blocks * 512 for path in folder.iterdir()}
    own = sum(size for name, size in disk.items() if not name.startswith("shared"))
    layers = LAYERS if shared else 1
    size = UserStore.open(folder).user_bytes
    return {
        "users": users, "write_s": written, **found, "tensor_bytes_a_layer": size / layers,
        "disk_bytes_a_layer": own / users / layers, "disk_MB": own / 1e6,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--users", type=int, default=10_000)
    parser.add_argument("--shared-users", type=int, default=1_000_000)
    parser.add_argument("--measure")
    given = parser.parse_args()
    if given.measure:
        measure(given.measure)
        return
    root = Path(tempfile.mkdtemp(dir=given.folder))
    try:
        for name, users, shared, dtype in (
            ("own edit, float32", given.users, False, torch.float32),
            ("shared, half", given.shared_users, True, torch.float16),
            ("shared, float32", given.shared_users, True, torch.float32),
        ):
            found = figures(root / name.replace(", ", "-").replace(" ", "-"), users, shared, dtype)
            print(name, json.dumps({key: round(value, 3) for key, value in found.items()}), flush=True)
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
