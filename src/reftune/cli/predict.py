"""`reftune predict`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from reftune.cli.common_options import BASE_MODEL
from reftune.cli.flags import with_flags
from reftune.errors import ReftuneError
from reftune.inference.settings import BaseModel
from reftune.output import terminal
from reftune.runs.recipe_values import read_columns, read_flags

_SHOWN = 20


def predict(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A classifier: the --output of `reftune train`.")],
    file: Annotated[str, typer.Option(help="Texts, in the columns of training; labels are not needed.")],
    out: Annotated[Path | None, typer.Option(help="Write every row's prediction to this .jsonl or .csv file.")] = None,
    columns: Annotated[str | None, typer.Option(help="Names of your columns: text=review,text_pair=title.")] = None,
    split: Annotated[str, typer.Option(help="Split of a Hub dataset.")] = "test",
    limit_rows: Annotated[int | None, typer.Option(help="Only the first so many rows.", min=1)] = None,
    batch_size: Annotated[int, typer.Option(help="Rows of one forward pass.", min=1)] = 32,
    **flags: Any,
) -> None:
    """The class of each text of a file with its probability, or the number predicted for it."""
    from reftune.cli.results import write_out
    from reftune.data.classification import read_texts
    from reftune.inference.classifying import as_csv, as_jsonl, load_classifier, predict, training_columns
    from reftune.output.targets import check_file_target, result_with

    writers = {".jsonl": as_jsonl, ".csv": as_csv}
    if out is not None and out.suffix.lower() not in writers:
        raise ReftuneError(f"--out {out}: the extension says the form; name a .jsonl or a .csv file.")
    if out is not None:
        check_file_target(out, "--out", [file], ours=result_with("label"))
    known, names = training_columns(folder)
    rows = read_texts(
        file, columns=read_columns(columns) or known, names=names, split=split, limit=limit_rows, labelled=False
    )
    classifier = load_classifier(folder, **asdict(read_flags(BaseModel, flags)))
    found = predict(classifier, rows, batch_size)
    table = Table(title=f"{file}: {len(rows)} rows", title_justify="left")
    for name in ("text", "label", "probability"):
        table.add_column(name, overflow="fold", justify="right" if name == "probability" else "left")
    for row, prediction in zip(rows[:_SHOWN], found, strict=False):
        text = row.text if row.text_pair is None else f"{row.text} | {row.text_pair}"
        shown = prediction.label if isinstance(prediction.label, str) else f"{prediction.label:.3f}"
        sure = "" if prediction.probability is None else f"{prediction.probability:.3f}"
        table.add_row(Text(terminal.visible(text)), Text(terminal.visible(shown)), sure)
    console = terminal.console()
    console.print(table)
    if len(rows) > _SHOWN:
        console.print(f"and {len(rows) - _SHOWN} more" + ("" if out else "; --out FILE.jsonl writes them all"))
    if out is not None:
        write_out(out, writers[out.suffix.lower()](rows, found, str(folder)), console)


with_flags(predict, BASE_MODEL)
