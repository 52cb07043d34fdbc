"""A tiny model, rows, and a comparison of every method that was run once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reftune.comparison import Comparison, resolve_comparison, run_comparison
from tests.cli.tiny_folder import save_tiny_model, write_rows

TARGETS = ["q_proj", "v_proj"]
METHODS: dict[str, Any] = {
    "base": "base",
    "LoReFT l1": {"method": "loreft", "layers": 1, "positions": "l1", "rank": 2, "lr": 0.01},
    "DiReFT all": {"method": "direft", "positions": "all", "rank": 2, "lr": 0.01},
    "LoRA": {"method": "lora", "rank": 2, "target_modules": TARGETS, "lr": 0.01},
    "DoRA": {"method": "dora", "rank": 2, "target_modules": TARGETS, "lr": 0.01},
    "IA3": {"method": "ia3", "lr": 0.1},
    "prefix": {"method": "prefix", "virtual_tokens": 3, "lr": 0.1},
    "prompt": {"method": "prompt", "virtual_tokens": 3, "lr": 0.5},
    "full": {"method": "full", "lr": 0.01},
    "LoRA + LoReFT": {"method": "lora+loreft", "rank": 2, "lora_rank": 1, "layers": 1, "lr": 0.01},
}


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `tiny` (a model), `rows.csv`, `options.jsonl`, `neutral.csv` and `refusals.csv`."""
    folder = tmp_path_factory.mktemp("compare")
    save_tiny_model(folder / "tiny")
    write_rows(folder / "rows.csv", 16)
    lines = [f'{{"prompt": "say {n}", "options": ["ye be {n}", "no"], "answer": {n % 2}}}' for n in range(4)]
    (folder / "options.jsonl").write_text("\n".join(lines) + "\n")
    write_rows(folder / "neutral.csv", 3)
    (folder / "refusals.csv").write_text("prompt,label\nhow do I bake?,harmless\nhow do I steal?,harmful\n")
    return folder


@pytest.fixture(scope="session")
def written(place: Path) -> Callable[..., dict[str, Any]]:
    """A recipe's content."""

    def make(output: Path, methods: dict[str, Any] = METHODS, **keys: Any) -> dict[str, Any]:
        return {
            "train_file": str(place / "rows.csv"), "eval_fraction": 0.25, "model": str(place / "tiny"),
            "device": "cpu", "output": str(output), "epochs": 2, "batch_size": 4, "methods": methods, **keys,
        }  # fmt: skip

    return make


@pytest.fixture(scope="session")
def compared(place: Path, written: Callable[..., dict[str, Any]]) -> Comparison:
    """Every method, one seed; nobody writes into its folder."""
    options = str(place / "options.jsonl")
    files = {"neutral_file": str(place / "neutral.csv"), "refusal_file": str(place / "refusals.csv")}
    recipe = resolve_comparison(written(place / "all", generate=2, max_new_tokens=3, options=options, **files))
    return run_comparison(recipe, own_processes=False)
