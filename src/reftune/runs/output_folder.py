"""What both kinds of run do with the output folder: check it, begin it, save into it, and replace files whole."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from peft import PeftModel

from reftune.adapter.checkpoint import CONFIG_FILE, WEIGHTS_FILE
from reftune.errors import ReftuneError
from reftune.output.files import write_text
from reftune.runs.recipe import RUN_FILE, TrainRecipe
from reftune.training.checkpoints import last_complete_checkpoint

METRICS_FILE, CARD_FILE, CURVE_FILE = "metrics.json", "README.md", "loss.png"
_UNFINISHED = ".unfinished-adapter"


def check_output(recipe: TrainRecipe, output: Path) -> str | None:
    """The checkpoint to resume from, or None to start; refuse what would destroy an unfinished run."""
    if output.exists() and not output.is_dir():
        raise ReftuneError(f"output={recipe.output!r} is a file; name a folder.")
    newest = last_complete_checkpoint(output)
    if recipe.resume:
        if newest is None:
            raise ReftuneError(f"resume: {output} holds no complete checkpoint; train without --resume.")
        return newest
    if newest and not recipe.overwrite and not (output / METRICS_FILE).is_file():
        raise ReftuneError(
            f"output={recipe.output!r} holds an unfinished run ({Path(newest).name}): go on with --resume, start "
            "again with --overwrite, or name another folder."
        )
    return None


def begin_output(recipe: TrainRecipe, output: Path, fresh: bool) -> None:
    """Make the folder, **forget what an earlier run left in it** (unless resumed), and write `run.yaml`."""
    output.mkdir(parents=True, exist_ok=True)
    (output / METRICS_FILE).unlink(missing_ok=True)
    if fresh:  # an earlier run's checkpoints are no part of this one
        for folder in output.glob("checkpoint-*"):
            shutil.rmtree(folder, ignore_errors=True)
    header = (
        f"# Written by reftune; `reftune train {recipe.output}/{RUN_FILE}` trains it again.\n"
        f"# torch {torch.__version__}, transformers {transformers.__version__}\n"
    )
    write_text(output / RUN_FILE, header + recipe.to_yaml())


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Write an adapter's two files, each whole or not at all, **in place of those in the folder**."""
    scratch = folder / _UNFINISHED
    try:
        model.save_pretrained(str(scratch))
        for name in (WEIGHTS_FILE, CONFIG_FILE):
            os.replace(scratch / name, folder / name)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def readable_disk_errors(folder: Path) -> Iterator[None]:
    """Say which folder could not be written, and what is still good there.

    Raises:
        ReftuneError: in place of an `OSError`, or of a safetensors error about the disk.
    """
    try:
        yield
    except ReftuneError:
        raise
    except Exception as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error)
        if not full and not isinstance(error, OSError):
            raise
        reason = "the disk is full" if full else (getattr(error, "strerror", None) or str(error))
        last = last_complete_checkpoint(folder)
        kept = f" {last} is whole: make room and go on with --resume." if last else ""
        raise ReftuneError(f"Cannot write to {folder}: {reason}.{kept}") from error
