"""Parity with pyreft 0.1.0, proven against pyreft itself.

Usage: python -m benchmarks.parity_pyreft [--env PATH] [--work PATH] [--without-smollm2] [--write-golden]

Builds an environment with pyreft and its old transformers if PATH has none, lets it make and train adapters, loads them
here, and prints what differs. The exit status is 1 where a figure misses its bound.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from benchmarks.parity_pyreft import cases, ours

HERE = Path(__file__).parent
GOLDEN = HERE.parent.parent / "tests" / "pyreft" / "golden"
STEPS = (
    ["torch==2.13.0"],
    ["transformers==4.45.1", "numpy<2.4", "accelerate", "datasets", "evaluate", "matplotlib", "ipywidgets", "plotnine",
     "sentencepiece", "protobuf"],
    ["--no-deps", "pyreft==0.1.0", "pyvene==0.1.8"],
)  # fmt: skip
LOGITS_BOUND, LOSS_BOUND = 1e-5, 1e-4
AS_WRITTEN = ("loreft", "consreft", "noreft_bias")


def build(env: Path) -> Path:
    """The interpreter of an environment with pyreft in it; made if need be."""
    python = env / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(env)], check=True)
        for packages in STEPS:
            subprocess.run([str(python), "-m", "pip", "install", "--quiet", *packages], check=True)
    return python


def main() -> int:
    """Run and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--env", type=Path, default=Path(tempfile.gettempdir()) / "pyreft-env", help="pyreft's environment"
    )
    parser.add_argument("--work", type=Path, help="folder of the peer's results; kept, and reused where it has them")
    parser.add_argument("--without-smollm2", action="store_true", help="compare on the tiny model alone")
    parser.add_argument("--write-golden", action="store_true", help="renew tests/pyreft/golden")
    arguments = parser.parse_args()
    work = arguments.work or Path(tempfile.mkdtemp(prefix="parity-pyreft-"))
    if not (work / "generations.json").is_file():
        extra = []
        if not arguments.without_smollm2:
            from reftune.models import bundled_folder

            extra = [str(bundled_folder())]
        python = build(arguments.env)
        subprocess.run([str(python), str(HERE / "peer.py"), str(work), *extra], check=True, stdout=subprocess.DEVNULL)
    *tables, passed = compare(work)
    for table in tables:
        Console(width=110).print(table)
    if arguments.write_golden:
        write_golden(work)
    return 0 if passed else 1


def compare(work: Path) -> tuple[Table, Table, bool]:
    """Every figure beside its bound, and whether all hold."""
    table = Table(title="reftune.pyreft against pyreft 0.1.0")
    table.add_column("largest difference of", no_wrap=True)
    for name in ("figure", "bound", "holds"):
        table.add_column(name, no_wrap=True)
    passed = True

    def add(what: str, figure: float, bound: float | None, shown: str = "{:.2e}") -> None:
        nonlocal passed
        holds = bound is None or figure <= bound
        passed &= holds
        limit = "-" if bound is None else f"{bound:g}"
        table.add_row(what, shown.format(figure), limit, "-" if bound is None else "yes" if holds else "NO")

    expected = ours.expected_logits(work)
    for name in cases.CASES:
        add(f"logits, {name}", (ours.logits_of(name, work) - expected[name]).abs().max().item(), LOGITS_BOUND)
    for which, record in ours.expected_generations(work).items():
        if which == "tiny":
            folder, model, case, count = work / "generation", ours.tiny_model(), cases.CASES["loreft_untied"], 12
        else:
            from reftune.models import load

            folder, model, count = work / "generation_smollm2", load("smollm2")[0], 16
            case = {"intervention": "Loreft", "layers": [8, 20]}
        found = ours.generations_of(folder, model, case, record["prompts"], count)
        wrong = sum(a != b for a, b in zip(found, record["tokens"], strict=True))
        add(f"generations that differ of {len(found)}, {which}", wrong, 0, "{:.0f}")
    peer = ours.expected_losses(work)
    same, default = (ours.loss_curve(work, kind) for kind in ("householder", "cholesky"))
    add("loss of 30 steps, householder", max(abs(a - b) for a, b in zip(same, peer, strict=True)), LOSS_BOUND)
    add("loss of 30 steps, cholesky", max(abs(a - b) for a, b in zip(default, peer, strict=True)), None)
    curves = Table("step", "pyreft", "householder", "cholesky", title="the losses themselves")
    for step in (0, 4, 9, 14, 19, 24, 29):
        curves.add_row(str(step + 1), *(f"{curve[step]:.5f}" for curve in (peer, same, default)))
    return table, curves, passed


def write_golden(work: Path) -> None:
    """Keep the small files that the tests read: a few as pyreft writes them (.bin), the rest as smaller safetensors."""
    shutil.rmtree(GOLDEN, ignore_errors=True)
    GOLDEN.mkdir(parents=True)
    expected = ours.expected_logits(work)
    save_file({name: expected[name] for name in cases.GOLDEN}, GOLDEN / "logits.safetensors")
    for name in (*cases.GOLDEN, "generation", "training_start"):
        shutil.copytree(work / name, GOLDEN / name)
        for file in (GOLDEN / name).glob("*.bin") if name not in AS_WRITTEN else []:
            tensors = torch.load(file, weights_only=True)
            save_file({n: t.contiguous() for n, t in tensors.items()}, file.with_suffix(".safetensors"))
            file.unlink()
    for name in ("training.json", "training_bases.safetensors"):
        shutil.copy(work / name, GOLDEN / name)
    tiny = ours.expected_generations(work)["tiny"]
    (GOLDEN / "generations.json").write_text(json.dumps({"tiny": tiny}), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
