"""`reftune eval` where the adapter is a classifier."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table


def evaluate_classifier(
    folder: Path,
    test_file: str,
    columns: str | None,
    split: str,
    limit_rows: int | None,
    batch_size: int,
    out: Path | None,
    model: str | None,
    dtype: str | None,
    device: str | None,
) -> None:
    """Print a classifier's metrics on labelled rows, each with its interval; arguments as for `reftune eval`."""
    from reftune.data.classification import read_texts
    from reftune.evaluation.classification import evaluate_classification
    from reftune.inference.classifying import load_classifier, training_columns
    from reftune.output.files import write_text
    from reftune.runs.output_folder import readable_disk_errors
    from reftune.runs.recipe_values import read_columns

    known, names = training_columns(folder)
    rows = read_texts(test_file, columns=read_columns(columns) or known, names=names, split=split, limit=limit_rows)
    classifier = load_classifier(folder, model=model, dtype=dtype, device=device)
    score = evaluate_classification(classifier, rows, batch_size)
    table = Table(title=f"{test_file}: {score.rows} rows", title_justify="left")
    for name, justify in (("", "left"), ("score", "right"), ("95% interval", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for name, value in score.metrics.items():
        found = score.intervals[name]
        table.add_row(name.replace("_", " "), f"{value:.4f}", f"{found.low:.4f} to {found.high:.4f}")
    table.add_row("squared error" if classifier.scheme.regression else "loss (nats a row)", f"{score.loss:.4f}", "")
    console = Console()
    console.print(table)
    if out is not None:
        record = {"test_file": test_file, **score.as_dict(), "predictions": score.predictions}
        with readable_disk_errors(out.parent):
            out.parent.mkdir(parents=True, exist_ok=True)
            write_text(out, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
        console.print(f"Written to {out}", markup=False, highlight=False, soft_wrap=True)
