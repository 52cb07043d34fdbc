"""The serving pictures of the documentation, from the lines that ``embedded`` or ``vllm`` wrote (``--out FILE``).

Usage: python -m benchmarks.serving.plots FILE [FOLDER] [PREFIX]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from reftune.output.pictures import new_figure, save_figure


def main(lines: str, folder: str = "docs/images", prefix: str = "serving") -> None:
    """Tokens a CPU second as a share of the base model's: by registered adapters, and by those active in one batch."""
    found = [json.loads(line) for line in Path(lines).read_text(encoding="utf-8").splitlines()]
    lora = {case["adapters"]: case["of base"] for case in found if case["case"].startswith("LoRA")}
    for name, wanted, label in (
        ("registered", "registered", "adapters registered"),
        ("active", "active in a batch of 64", "different adapters in a batch of 64"),
    ):
        figure, axes = new_figure((7, 3.6), grid=True)
        cases = [case for case in found if case["case"] == wanted]
        for kind in dict.fromkeys(case["kind"] for case in cases):
            of = sorted((case["adapters"], case["of base"]) for case in cases if case["kind"] == kind)
            axes.plot(*zip(*of, strict=True), marker="o", label=kind)
        if lora and wanted == "registered":
            axes.plot(
                *zip(*sorted(lora.items()), strict=True), marker="s", ls="--", label="LoRA r 8, PEFT's mixed batch"
            )
        axes.axhline(1, color="#6b7280", linewidth=0.8)
        axes.set(xscale="log", xlabel=label, ylabel="tokens a CPU second,\nshare of the base model's", ylim=(0, 1.2))
        ticks = sorted({case["adapters"] for case in cases})
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.minorticks_off()
        axes.legend(loc="lower left", fontsize=8, frameon=False, ncols=2)
        save_figure(figure, Path(folder) / f"{prefix}-{name}.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
