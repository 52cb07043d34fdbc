"""Checkpoints that are whole or absent: written beside their place and moved there, checked before use.

transformers writes a checkpoint in place, so a kill in the middle leaves a folder that looks like one. Here it is
written into a hidden folder of the same parent and renamed when complete. Folders written by another trainer are judged
by their content.
"""

from __future__ import annotations

import errno
import json
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

RUN_STATE_NAME = "reftune_state.json"
"""What our trainer needs besides transformers' files to go on exactly: see `ReftTrainer`."""

UNFINISHED = ".unfinished-checkpoint"
"""The hidden folder, beside the checkpoints, in which the next one grows."""

_CHECKPOINT = re.compile(r"^checkpoint-(\d+)$")
_REPLACED = ".replaced-"
_WRITE_FAILURES = ("PytorchStreamWriter", "inline_container", "os error", "file write failed")


def incomplete_reason(folder: str | os.PathLike[str]) -> str | None:
    """Why training cannot resume from this folder, or None where it can: every file that is there must be whole."""
    path = Path(folder)
    if not path.is_dir():
        return "there is no such folder"
    state = path / TRAINER_STATE_NAME
    try:
        json.loads(state.read_text(encoding="utf-8"))["global_step"]
    except FileNotFoundError:
        return f"{TRAINER_STATE_NAME} is missing"
    except (OSError, ValueError, KeyError, TypeError):
        return f"{TRAINER_STATE_NAME} is damaged"
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
        if not zipfile.is_zipfile(file):  # torch.save's index is at the end: a file cut short has none
            return f"{file.name} is damaged"
    return None


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
        if not _is_write_failure(error):
            raise
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error)
        reason = "the disk is full" if full or _nearly_full(run_dir) else str(error).split("\n")[0]
        last = last_complete_checkpoint(run_dir)
        kept = (
            f"The checkpoint {last} is complete: make room and resume from it"
            if last
            else "Make room, or choose another folder"
        )
        raise ReftuneError(f"Could not write a checkpoint to {run_dir}: {reason}. {kept}.") from error


def _is_write_failure(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return True
    return isinstance(error, (RuntimeError, SafetensorError)) and any(word in str(error) for word in _WRITE_FAILURES)


def _nearly_full(folder: str) -> bool:
    try:
        return shutil.disk_usage(folder).free < 1 << 20
    except OSError:
        return False
