"""What both kinds of run do with the output folder: check it, begin it, save into it, and replace files whole."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import torch
import transformers
from peft import PeftModel
from transformers.trainer import TRAINER_STATE_NAME

from reftune.adapter.checkpoint import CONFIG_FILE, WEIGHTS_FILE
from reftune.errors import ReftuneError
from reftune.output.files import write_failure, write_text
from reftune.output.locks import LOCK_FILE, only_writer, refuse_if_locked
from reftune.output.targets import check_folder_target
from reftune.runs import processes
from reftune.runs.fingerprint import FINGERPRINT_FILE, write_fingerprint
from reftune.runs.recipe import RUN_FILE, TrainRecipe
from reftune.training.checkpoints import damaged_checkpoints, foreign_files, last_complete_checkpoint
from reftune.users.names import INDEX_FILE

METRICS_FILE, CARD_FILE, CURVE_FILE = "metrics.json", "README.md", "loss.png"
_UNFINISHED, _STAGED, _LOGS = ".unfinished-adapter", ".unfinished-run", "runs"
_OURS = (RUN_FILE, METRICS_FILE, LOCK_FILE, _STAGED, "checkpoint-*")
"""What a folder holds that a run may write into."""
_REPLACED = ("checkpoint-*", "test*_predictions.jsonl", _LOGS)
"""What an earlier run may have left that a new one need not have."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OutputPlace:
    """Where a run writes.

    Attributes:
        output: the folder that the recipe names.
        folder: where the run grows: the output, or a hidden folder in it while a run is there that it will replace.
        checkpoint: what it goes on from; None from the beginning.
    """

    output: Path
    folder: Path
    checkpoint: str | None


def check_output(recipe: TrainRecipe) -> OutputPlace:
    """Where the run of a recipe will write; nothing is changed yet.

    Raises:
        ReftuneError: a place that is not ours to write, that another run is writing, or with an unfinished run.
    """
    if not recipe.output.strip():
        raise ReftuneError(f"output={recipe.output!r} is no name; name a folder.")
    output = Path(recipe.output).expanduser()
    inputs = [recipe.train_file, recipe.eval_file, recipe.test_file]
    check_folder_target(output, "output=", _OURS, inputs, recipe.model)
    for name in filter(None, inputs):
        with suppress(ValueError):  # it is elsewhere
            first = Path(name).expanduser().absolute().relative_to(output.absolute()).parts[:1]
            if any(fnmatch(part, pattern) for part in first for pattern in (*_OURS, *_REPLACED)):
                raise ReftuneError(f"output={recipe.output!r} would replace {name}, which is read: name another.")
    refuse_if_locked(output)
    if (output / INDEX_FILE).exists():
        raise ReftuneError(f"output={recipe.output!r} is a store of users: give --adapter-column, or another folder.")
    if not recipe.resume:
        foreign = [file for old in sorted(output.glob("checkpoint-*")) for file in foreign_files(old)]
        logs = sorted((output / _LOGS).rglob("*"))
        foreign += [file for file in logs if not file.is_dir() and "tfevents" not in file.name]
        if foreign:
            shown = ", ".join(str(file.relative_to(output)) for file in foreign[:3])
            raise ReftuneError(
                f"output={recipe.output!r} holds what no run wrote and a new one would remove ({shown}"
                f"{', ...' if foreign[3:] else ''}): move it away, or name another folder."
            )
    return _place(recipe, output)


def _place(recipe: TrainRecipe, output: Path) -> OutputPlace:
    staged, finished = output / _STAGED, (output / METRICS_FILE).is_file()
    if recipe.resume:
        folder = staged if last_complete_checkpoint(staged) else output
        newest = last_complete_checkpoint(folder)
        damaged = [f"{path.name}: {why}" for path, why in damaged_checkpoints(folder)]
        if newest is None:
            why = f" ({'; '.join(damaged)})" if damaged else ""
            raise ReftuneError(f"resume: {output} holds no complete checkpoint{why}; train without --resume.")
        for line in damaged:
            logger.warning("A checkpoint is passed over, %s", line)
        return OutputPlace(output, folder, newest)
    newest = last_complete_checkpoint(staged) or (None if finished else last_complete_checkpoint(output))
    if newest and not recipe.overwrite:
        raise ReftuneError(
            f"output={recipe.output!r} holds an unfinished run ({Path(newest).name}): go on with --resume, start "
            "again with --overwrite, or name another folder."
        )
    there = finished or (output / WEIGHTS_FILE).is_file() or next(output.glob("checkpoint-*"), None) is not None
    return OutputPlace(output, staged if there else output, None)


@contextmanager
def held_output(recipe: TrainRecipe, place: OutputPlace) -> Iterator[None]:
    """Keep other runs out of the output while this one lasts; **what it began is removed** if it saves no checkpoint.

    Raises:
        ReftuneError: another run has come first.
    """
    if processes.rank() > 0:  # the first one holds it for all
        yield
        return
    output, absent = place.output, _first_absent(place.output)
    try:
        with readable_disk_errors(output):
            output.mkdir(parents=True, exist_ok=True)
        with only_writer(output):
            if _place(recipe, output) != place:
                raise ReftuneError(f"output={recipe.output!r}: another run has written there meanwhile; try again.")
            try:
                yield
            except BaseException:
                if place.checkpoint is None and last_complete_checkpoint(place.folder) is None:
                    _remove_beginning(place)
                raise
    finally:
        if absent is not None:
            _remove_empty(output, absent)


def begin_output(recipe: TrainRecipe, place: OutputPlace, found: Mapping[str, str]) -> None:
    """Write `run.yaml` and the fingerprint; a finished run that is resumed keeps its own until the end."""
    if place.checkpoint is None and place.folder != place.output:
        shutil.rmtree(place.folder, ignore_errors=True)  # a run that was to replace this one and was given up
    place.folder.mkdir(parents=True, exist_ok=True)
    if not (place.folder / METRICS_FILE).is_file():
        write_recipe(recipe, place.folder)
        write_fingerprint(place.folder, found)


def write_recipe(recipe: TrainRecipe, folder: Path) -> None:
    """Write `run.yaml`."""
    header = (
        f"# Written by reftune; `reftune train {recipe.output}/{RUN_FILE}` trains it again.\n"
        f"# torch {torch.__version__}, transformers {transformers.__version__}\n"
    )
    write_text(folder / RUN_FILE, header + recipe.to_yaml())


def publish_run(place: OutputPlace) -> None:
    """Move a finished run to where an earlier one is, which **it replaces**; the metrics, which say so, come last."""
    if place.folder == place.output:
        return
    for state in place.folder.glob(f"checkpoint-*/{TRAINER_STATE_NAME}"):
        state.write_text(state.read_text(encoding="utf-8").replace(f"/{_STAGED}/", "/"), encoding="utf-8")
    (place.output / METRICS_FILE).unlink(missing_ok=True)
    for pattern in _REPLACED:
        for old in place.output.glob(pattern):
            shutil.rmtree(old, ignore_errors=True) if old.is_dir() else old.unlink()
    for entry in sorted(place.folder.iterdir(), key=lambda entry: entry.name == METRICS_FILE):
        os.replace(entry, place.output / entry.name)
    place.folder.rmdir()


def _remove_beginning(place: OutputPlace) -> None:
    if place.folder != place.output:
        shutil.rmtree(place.folder, ignore_errors=True)
        return
    for name in (RUN_FILE, FINGERPRINT_FILE):
        (place.folder / name).unlink(missing_ok=True)
    shutil.rmtree(place.folder / _LOGS, ignore_errors=True)


def _first_absent(folder: Path) -> Path | None:
    """The outermost folder that would have to be made."""
    missing = [one for one in (folder, *folder.parents) if not one.exists()]
    return missing[-1] if missing else None


def _remove_empty(folder: Path, absent: Path) -> None:
    with suppress(OSError):
        for one in (folder, *folder.parents):
            one.rmdir()  # fails where it is not empty
            if one == absent:
                return


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
        reason = write_failure(error)
        if reason is None:
            raise
        last = last_complete_checkpoint(folder)
        kept = f" {last} is whole: make room and go on with --resume." if last else ""
        raise ReftuneError(f"Cannot write to {folder}: {reason}.{kept}") from error
