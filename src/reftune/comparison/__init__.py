"""Several methods trained on the same rows, order and budget, with several seeds, and a report of what each came to.

Open `recipe.py`, `methods.py` and `checking.py` for what can be compared, `runner.py`, `single_run.py` and
`worker.py` for carrying it out, `results.py` and `summary.py` for figures, `report.py`, `tables.py` and `figures.py`
for the report. It must not import `cli` or `sweeps`.

From Python:

    from reftune.comparison import resolve_comparison, run_comparison, summarise, write_report

    recipe = resolve_comparison("compare.yaml")      # or a mapping with the same keys, as here:
    recipe = resolve_comparison({
        "train_file": "train.jsonl", "eval_file": "test.jsonl", "model": "smollm2", "output": "out/compare",
        "epochs": 3, "batch_size": 8, "seeds": [0, 1, 2],
        "methods": {
            "LoReFT l1": {"method": "loreft", "layers": 8, "positions": "l1", "rank": 4, "lr": 4e-3},
            "LoRA r8": {"method": "lora", "rank": 8, "target_modules": ["q_proj", "v_proj"], "lr": 1e-3},
        },
    })
    comparison = run_comparison(recipe)              # runs what is not done yet; own_processes=False is in this process
    comparison.results                               # a RunResult a (method, seed)
    comparison.of("LoRA r8")[0].loss                 # held-out loss a supervised token, in nats
    comparison.of("LoRA r8")[0].row_losses           # summed over each held-out row, in the rows' order
    summarise(comparison)                            # a MethodSummary a method: means, intervals, paired differences
    write_report(comparison)                         # output/report.html, output/report.md, output/figures/

Each run is `output/runs/<method>/seed<k>/`, with `result.json` written last: a comparison that was interrupted goes on,
and after a change to the recipe only the runs whose settings changed are run again. Runs of one seed see the same
batches in the same order (`RunResult.order` is their digest), and every method is trained with the loss of
`ReftTrainer`: cross-entropy a supervised token.
"""

from reftune.comparison.recipe import CompareRecipe, resolve_comparison
from reftune.comparison.report import write_report
from reftune.comparison.results import RunResult
from reftune.comparison.runner import Comparison, ComparisonInterrupted, run_comparison
from reftune.comparison.summary import MethodSummary, summarise

__all__ = [
    "Comparison",
    "ComparisonInterrupted",
    "CompareRecipe",
    "MethodSummary",
    "RunResult",
    "resolve_comparison",
    "run_comparison",
    "summarise",
    "write_report",
]
