"""`reftune eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from reftune.cli.app import app


@app.command("eval")
def evaluate(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Adapter folder: the --output of `reftune train`.")],
    test_file: Annotated[str, typer.Option(help="Rows that training did not see; the formats of --train-file.")],
    columns: Annotated[
        str | None, typer.Option(help="Names of your columns: prompt=question,completion=answer.")
    ] = None,
    split: Annotated[str, typer.Option(help="Split of a Hub dataset.")] = "train",
    limit_rows: Annotated[int | None, typer.Option(help="Only the first so many rows.", min=1)] = None,
    batch_size: Annotated[int, typer.Option(help="Rows of one forward pass.")] = 8,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer for the exact match, in tokens.")] = 128,
    generate: Annotated[bool, typer.Option(help="Answer greedily and count exact matches.")] = True,
    base: Annotated[bool, typer.Option(help="Score the base model beside it.")] = True,
    out: Annotated[Path | None, typer.Option(help="Write scores and answers to this JSON file.")] = None,
    model: Annotated[str | None, typer.Option(help="Base model; default: the one it was trained on.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Data type; default: as trained.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; default: the best there is.")] = None,
) -> None:
    """Held-out loss and exact match of an adapter, beside its base model."""
    import json

    from reftune.data.formats import read_examples
    from reftune.evaluation.heldout import evaluate_rows
    from reftune.inference.generation import GenerationSettings
    from reftune.inference.loading import load_edited
    from reftune.recipes import read_columns
    from reftune.runs import readable_disk_errors, write_text

    settings = GenerationSettings(max_new_tokens=max_new_tokens, batch_size=batch_size)
    rows = read_examples(test_file, columns=read_columns(columns), split=split, limit=limit_rows)
    edited = load_edited(folder, model=model, dtype=dtype, device=device)
    names = ["base", "edited"] if base else ["edited"]
    scores = {name: evaluate_rows(edited, rows, settings, base=name == "base", generate=generate) for name in names}

    table = Table(
        title=f"{test_file}: {len(rows)} rows, {scores['edited'].tokens} supervised tokens", title_justify="left"
    )
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right")
    table.add_row("loss (nats a supervised token)", *(f"{scores[name].loss:.4f}" for name in names))
    table.add_row("perplexity", *(f"{scores[name].perplexity:.3f}" for name in names))
    if generate:
        table.add_row("exact match", *(f"{scores[name].exact_match:.1%}" for name in names))
    console = Console()
    console.print(table)
    if out is not None:
        record: dict[str, object] = {"test_file": test_file, "rows": len(rows)}
        record |= {name: score.as_dict() for name, score in scores.items()}
        if generate:
            answers = {name: score.answers or [] for name, score in scores.items()}
            record["answers"] = [
                {"completion": row.completion, **{name: answers[name][index] for name in names}}
                for index, row in enumerate(rows)
            ]
        with readable_disk_errors(out.parent):
            out.parent.mkdir(parents=True, exist_ok=True)
            write_text(out, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
        console.print(f"Written to {out}", markup=False, highlight=False, soft_wrap=True)
