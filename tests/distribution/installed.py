"""Try a wheel that was installed alone: ``python installed.py PYTHON``, from a folder outside the repository.

PYTHON has reftune and what it depends on, none of its extras, and no source of ours on its path. `make dist` calls this.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).parents[1]
IMPORTS = """
import importlib, importlib.metadata as metadata, importlib.resources as resources, pkgutil, sys
import reftune
assert reftune.__file__.startswith(sys.prefix), reftune.__file__
for name in ("py.typed", "serving/page/index.html", "runs/templates/README.md.j2", "data/demo_persona.jsonl"):
    assert resources.files("reftune").joinpath(name).is_file(), name
groups = {entry.group for entry in metadata.distribution("reftune").entry_points}
assert groups == {"console_scripts", "vllm.general_plugins", "vllm.endpoint_plugins"}, groups
extras, missing = {"fastapi", "prometheus_client", "triton", "uvicorn", "vllm"}, set()
for module in pkgutil.walk_packages(reftune.__path__, "reftune.", onerror=lambda name: None):
    try:
        importlib.import_module(module.name)
    except reftune.ReftuneError as error:
        assert "pip install 'reftune[" in str(error), f"{module.name}: {error}"
    except ModuleNotFoundError as error:
        assert error.name.split(".")[0] in extras, f"{module.name}: {error}"
        missing.add(module.name)
parts = ("reftune.serving.api", "reftune.serving.page", "reftune.serving.vllm")
assert all(name.startswith(parts) for name in missing), missing
print(f"{reftune.__version__}: every module can be imported, but for {len(missing)} of serving")
"""
MODEL = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from tiny_folder import save_tiny_model, write_rows
save_tiny_model(Path("tiny"))
write_rows(Path("rows.csv"))
Path("probe.jsonl").write_text('{"text": "good", "label": true}\\n{"text": "bad", "label": false}\\n' * 4)
Path("sweep.yaml").write_text("train_file: rows.csv\\nmodel: tiny\\noutput: swept\\neval_fraction: 0.3\\nsearch: {lr: [0.001, 0.01]}\\n")
Path("x.gguf").write_bytes(b"GGUF")
"""
EXTRAS = {
    "pip install 'reftune[serve]'": ["serve", "tiny", "--adapters", "out"],
    "pip install 'reftune[sweep]'": ["sweep", "sweep.yaml"],
    "pip install 'reftune[sign]'": ["sign", "out", "--new-key", "key.pem"],
    "pip install 'reftune[eval]'": ["lm-eval", "run", "--model", "reftune"],
    "pip install 'reftune[demo]'": ["demo"],
    "pip install gguf": ["train", "--train-file", "rows.csv", "--model", "x.gguf", "--output", "other"],
    "pip install scikit-learn": ["steer", "probe.jsonl", "--model", "tiny", "--estimator", "probe", "--output", "probe"],
    "pip install 'reftune[quantised]'": ["train", "--train-file", "rows.csv", "--model", "tiny", "--quantization", "4bit"],
}  # fmt: skip
"""A command that wants an extra, by what its error must tell to do."""


def main(python: str) -> None:
    """Run the checks, and stop at the first that fails."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"HF_HUB_OFFLINE": "1", "REFTUNE_CACHE": "no-cache"}

    def run(*command: str, status: int = 0) -> str:
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == status, f"{command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr, done.stderr
        return done.stdout + done.stderr

    reftune = str(Path(python).with_name("reftune"))
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        print(run(python, "-c", IMPORTS), end="")
        run(python, "-c", MODEL, str(TESTS / "cli"))
        run(reftune, "--help")
        small = ["--layers", "all", "--rank", "1", "--epochs", "1", "--output", "out"]
        run(reftune, "train", "--train-file", "rows.csv", "--model", "tiny", *small)
        assert {"adapter_model.safetensors", "run.yaml", "README.md"} <= {path.name for path in Path("out").iterdir()}
        run(reftune, "info", "out")
        run(reftune, "generate", "out", "--prompt", "say 3", "--max-new-tokens", "4")
        print("train, info and generate work")
        for said, command in EXTRAS.items():
            told = run(reftune, *command, status=2)
            assert said in told, f"reftune {' '.join(command)} does not say `{said}`:\n{told}"
        print(f"{len(EXTRAS)} commands that want an extra say which")


if __name__ == "__main__":
    main(os.path.abspath(sys.argv[1]))
