"""The peers' environments, each built once with its own old versions."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

STEPS = {
    "adapters": (["torch==2.13.0"], ["adapters==1.3.0", "transformers~=4.57.0", "numpy<2.4", "accelerate", "datasets"]),
}


def interpreter(peer: str, folder: Path | None = None) -> Path:
    """The interpreter of a peer's environment; made if need be."""
    if peer == "pyreft":
        from benchmarks.parity_pyreft.__main__ import build

        return build(folder or Path(tempfile.gettempdir()) / "pyreft-env")
    env = folder or Path(tempfile.gettempdir()) / f"{peer}-env"
    python = env / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(env)], check=True)
        for packages in STEPS[peer]:
            subprocess.run([str(python), "-m", "pip", "install", "--quiet", *packages], check=True)
    return python
