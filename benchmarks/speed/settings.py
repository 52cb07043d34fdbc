"""What is measured: five settings of data and adapter, and the systems that train each on the same tokens."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"


@dataclass(frozen=True)
class Setting:
    """One row of the table."""

    name: str
    title: str
    file: str
    layers: list[int]
    positions: str
    rank: int
    batch_size: int = 8


EVERY = list(range(30))
SETTINGS = {
    setting.name: setting
    for setting in (
        Setting("a", "ARC-Easy, layer 8, l1, r 4", "arc_easy/train.json", [8], "l1", 4),
        Setting("b", "arithmetic, layer 8, l1, r 4", "arithmetic/train.json", [8], "l1", 4),
        Setting("c", "ARC-Easy, all layers, f7+l7, r 8", "arc_easy/train.json", EVERY, "f7+l7", 8),
        Setting("d", "arithmetic, all layers, l1, r 4", "arithmetic/train.json", EVERY, "l1", 4),
        Setting("e", "ojousama, layer 8, l1, r 4, batch 4", "ojousama.csv", [8], "l1", 4, batch_size=4),
    )
}

SYSTEMS = {
    "reftune": "reftune",
    "reftune-plain": "reftune, prefix reuse off",
    "pyreft": "pyreft 0.1.0 (own environment)",
    "lora": "PEFT LoRA r 8 on q, v",
    "lora-supervised": "PEFT LoRA with our supervised-only logits",
    "adapters": "adapters 1.3.0 LoReFT (own environment)",
    "floor": "floor: base forward, activation gradients backward",
    "floor-grouped": "the same floor, rows grouped by length",
}


def prepare(setting: Setting, rows: int, folder: Path) -> Path:
    """Tokenise once, so that every system trains on the same batches; the file says everything a worker needs."""
    from reftune.data.formats import read_examples
    from reftune.data.tokenising import encode_dataset
    from reftune.models import load

    _, tokenizer = load("smollm2")
    dataset = encode_dataset(read_examples(DATA / setting.file, limit=rows), tokenizer, max_length=512)
    found = [
        {name: row[name] for name in ("input_ids", "labels", "prompt_length")}
        for row in (dataset[index] for index in range(len(dataset)))
    ]
    path = folder / f"{setting.name}.json"
    path.write_text(json.dumps({**asdict(setting), "rows": found, "pad": tokenizer.pad_token_id}))
    return path
