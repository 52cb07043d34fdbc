"""Checkpoints that are whole or absent: written beside their place and moved there, checked before use.

transformers writes a checkpoint in place, so a kill in the middle leaves a folder that looks like one. Here it is
written into a hidden folder of the same parent and renamed when complete. Folders written by another trainer are judged
by their content.
"""

from __future__ import annotations

import os
import re
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.trainer import TRAINER_STATE_NAME

from reftune.errors import ReftuneError
from reftune.output.files import write_failure
from reftune.output.json_files import read_json_object

RUN_STATE_NAME = "reftune_state.json"
"""What our trainer needs besides transformers' files to go on exactly: see `ReftTrainer`."""

UNFINISHED = ".unfinished-checkpoint"
"""The hidden folder, beside the checkpoints, in which the next one grows."""

_CHECKPOINT = re.compile(r"^checkpoint-(\d+)$")
_REPLACED = ".replaced-"


def incomplete_reason(folder: str | os.PathLike[str]) -> str | None:
    """Why training cannot resume from this folder, or None where it can: every file that is there must be whole."""
    path = Path(folder)
    if not path.is_dir():
        return "there is no such folder"
    state = path / TRAINER_STATE_NAME
    if not state.is_file():
        return f"{TRAINER_STATE_NAME} is missing"
    try:
        int(read_json_object(state)["global_step"])
    except (ReftuneError, KeyError, TypeError, ValueError):
        return f"{TRAINER_STATE_NAME} is damaged"
    try:
        record = read_json_object(path / RUN_STATE_NAME) if (path / RUN_STATE_NAME).is_file() else {}
    except ReftuneError:
        return f"{RUN_STATE_NAME} is damaged"
    for name, size in record.get("files", {}).items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if (path / name).stat().st_size != size:
            return f"{name} is damaged"
    weights = [*path.glob("*.safetensors"), *path.glob("*/adapter_model.safetensors")]
    others = [*path.glob("adapter_model.bin"), *path.glob("pytorch_model*"), *path.glob("global_step*")]
    if not weights and not others:
        return "it holds no weights"
    for file in weights:
        try:
            with safe_open(str(file), framework="pt") as opened:
                opened.keys()
        except (SafetensorError, OSError):
            return f"{file.relative_to(path)} is damaged"
    for file in sorted([*path.glob("*.pt"), *path.glob("*.pth")]):
        if not _is_whole_zip(file):
            return f"{file.name} is damaged"
    return None


def written_files(folder: Path) -> dict[str, int]:
    """The files of a checkpoint with their sizes in bytes, for its record; the states are written later."""
    return {
        file.relative_to(folder).as_posix(): file.stat().st_size
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name not in (TRAINER_STATE_NAME, RUN_STATE_NAME)
    }


def foreign_files(folder: Path) -> list[Path]:
    """What lies in a ``checkpoint-N`` and was not written by this trainer: everything, where there is no record."""
    if folder.is_symlink() or not folder.is_dir():
        return [folder]
    held = [file for file in sorted(folder.rglob("*")) if not file.is_dir()]
    if not (folder / RUN_STATE_NAME).is_file():
        return held
    try:
        files = read_json_object(folder / RUN_STATE_NAME)["files"]
    except (ReftuneError, KeyError):  # damaged, or written by several processes, which list none
        return []
    known = {*files, TRAINER_STATE_NAME, RUN_STATE_NAME}
    names = [(file, file.relative_to(folder).as_posix()) for file in held]
    return [file for file, name in names if name not in known and not name.startswith("rng_state")]


def _is_whole_zip(file: Path) -> bool:
    """Whether every entry of a file that torch.save wrote is there and has its checksum."""
    try:
        with zipfile.ZipFile(file) as opened:
            return opened.testzip() is None
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return False


def last_complete_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """The newest ``checkpoint-N`` of a training's output folder that can be resumed from, or None."""
    root = Path(output_dir)
    if not root.is_dir():
        return None
    found = [(int(match[1]), entry) for entry in root.iterdir() if (match := _CHECKPOINT.match(entry.name))]
    for _, entry in sorted(found, reverse=True):
        if incomplete_reason(entry) is None:
            return str(entry)
    return None


def damaged_checkpoints(output_dir: str | os.PathLike[str]) -> list[tuple[Path, str]]:
    """The ``checkpoint-N`` of a folder that cannot be resumed from, each with the reason."""
    reasons = [(entry, incomplete_reason(entry)) for entry in sorted(Path(output_dir).glob("checkpoint-*"))]
    return [(entry, reason) for entry, reason in reasons if reason is not None]


def require_complete(folder: str | os.PathLike[str]) -> None:
    """Refuse a checkpoint that cannot be resumed from.

    Raises:
        ReftuneError: naming the folder, what is wrong with it, and the newest one beside it that is whole.
    """
    reason = incomplete_reason(folder)
    if reason is None:
        return
    other = last_complete_checkpoint(Path(folder).parent)
    way_out = f"resume from {other}, the newest complete one" if other else "start again without resuming"
    raise ReftuneError(f"Cannot resume from {folder}: {reason}. To go on: {way_out}.")


def clear_leftovers(run_dir: str) -> None:
    """Remove what saves that were killed have left beside the checkpoints."""
    for name in os.listdir(run_dir) if os.path.isdir(run_dir) else []:
        if name == UNFINISHED or name.startswith(_REPLACED):
            shutil.rmtree(os.path.join(run_dir, name), ignore_errors=True)


def publish(folder: str, destination: str) -> None:
    """Move a finished checkpoint to its place; **replaces what is there**."""
    replaced = None
    if os.path.exists(destination):
        replaced = os.path.join(os.path.dirname(destination), f"{_REPLACED}{os.path.basename(destination)}")
        shutil.rmtree(replaced, ignore_errors=True)
        os.replace(destination, replaced)
    os.replace(folder, destination)
    if replaced is not None:
        shutil.rmtree(replaced, ignore_errors=True)


@contextmanager
def readable_write_errors(run_dir: str, unfinished: str | None) -> Iterator[None]:
    """Turn a failed write (a full disk above all) into a message, and clear away what was written of it.

    torch and safetensors report a full disk as their own errors, not as an OSError.

    Raises:
        ReftuneError: naming the folder, the reason, and the checkpoint that is still good.
    """
    try:
        yield
    except BaseException as error:
        if unfinished is not None:
            shutil.rmtree(unfinished, ignore_errors=True)
        reason = write_failure(error)
        if reason is None:
            raise
        reason = "the disk is full" if _nearly_full(run_dir) else reason
        last = last_complete_checkpoint(run_dir)
        kept = (
            f"The checkpoint {last} is complete: make room and resume from it"
            if last
            else "Make room, or choose another folder"
        )
        raise ReftuneError(f"Could not write a checkpoint to {run_dir}: {reason}. {kept}.") from error


def _nearly_full(folder: str) -> bool:
    try:
        return shutil.disk_usage(folder).free < 1 << 20
    except OSError:
        return False
