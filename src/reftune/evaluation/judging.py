"""A judge of answers: a function of the user's, or a classifier.

| written | what it is |
|---|---|
| `module:function`, `file.py:function` | takes an answer's text; accepts with True, or with a number above 0.5 |
| `FOLDER:CLASS` | a classifier: a reftune adapter or a transformers model; accepts what it takes for that class |
| `FOLDER` | the same, of the class called 1, true, yes, positive, accept or accepted; of a number, above 0.5 |
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import numbers
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from reftune.data.formats import LabelledText
from reftune.errors import ReftuneError

Judge = Callable[[Sequence[str]], list[bool]]
"""Says of each answer whether it is accepted."""

_ACCEPTING = ("1", "true", "yes", "positive", "accept", "accepted")
_FORMS = "write FOLDER, FOLDER:CLASS, module:function or file.py:function"


def load_judge(source: str) -> Judge:
    """The judge that a text names; **a module or Python file that it names is run**.

    Args:
        source: as in the module's table.

    Raises:
        ReftuneError: there is no such folder, file, function or class, or it cannot be read.
    """
    if Path(source).expanduser().is_dir():
        return _classifier(Path(source).expanduser(), None)
    place, colon, name = source.rpartition(":")
    if colon and name and Path(place).expanduser().is_dir():
        return _classifier(Path(place).expanduser(), name)
    return _of_function(load_function(source, "judge", "is no folder and names no function", _FORMS), source)


def full_source(source: str) -> str:
    """The same judge from any folder: a folder or file that is there, by its full path."""
    place, colon, name = source.rpartition(":")
    for path, rest in ((source, ""), (place, colon + name)):
        if path and (found := Path(path).expanduser()).exists():
            return f"{found.resolve()}{rest}"
    return source


def accepted_share(judge: Judge, answers: Sequence[str]) -> float:
    """The share of answers that a judge accepts."""
    return sum(judge(answers)) / len(answers)


def load_function(
    source: str, what: str, lacking: str = "names no function", forms: str = "write module:function or file.py:function"
) -> Callable[..., Any]:
    """The function that ``module:function`` or ``file.py:function`` names; **the module or file is run**.

    Args:
        source: the text.
        what: it is to be, for messages.
        lacking: what is wrong with a text that names none.
        forms: what may be written.

    Raises:
        ReftuneError: there is no such file or function, or it cannot be loaded.
    """
    place, colon, name = source.rpartition(":")
    if not colon or not place or not name:
        raise ReftuneError(f"{what} {source!r} {lacking}: {forms}.")
    try:
        if place.endswith(".py"):
            path = Path(place).expanduser()
            if not path.is_file():
                raise ReftuneError(f"{what} {source!r}: there is no file {path}.")
            spec = importlib.util.spec_from_file_location(f"reftune_{what}_{path.stem}", path)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            sys.path.insert(0, os.getcwd())  # as `python -m` finds modules
            try:
                module = importlib.import_module(place)
            finally:
                sys.path.pop(0)
    except ReftuneError:
        raise
    except (Exception, SystemExit) as error:  # whatever the user's own code raises
        missing = isinstance(error, ModuleNotFoundError) and error.name == place.partition(".")[0]
        way_out = f"; {forms}" if missing else ""
        raise ReftuneError(f"{what} {source!r} cannot be loaded: {type(error).__name__}: {error}{way_out}.") from error
    function = getattr(module, name, None)
    if not callable(function):
        state = "has no function" if function is None else "has, but not as a function,"
        raise ReftuneError(f"{what} {source!r}: {place} {state} {name!r}.")
    return function


def _of_function(function: Callable[[str], Any], source: str) -> Judge:
    def accepts(answer: str) -> bool:
        try:
            found = function(answer)
        except (Exception, SystemExit) as error:  # whatever the user's own code raises
            raise ReftuneError(
                f"judge {source!r} failed on the answer {answer[:60]!r}: {type(error).__name__}: {error}"
            ) from error
        if not isinstance(found, numbers.Real) and hasattr(found, "item"):
            found = found.item()  # a number of numpy or torch
        if not isinstance(found, numbers.Real) or math.isnan(found):
            raise ReftuneError(f"judge {source!r} gave {found!r:.60} for an answer: return True, False or a number.")
        return float(found) > 0.5

    return lambda answers: [accepts(answer) for answer in answers]


def _classifier(folder: Path, label: str | None) -> Judge:
    from reftune.adapter.checkpoint import CONFIG_FILE
    from reftune.inference.classifying import load_classifier, load_plain_classifier, predict

    if not any((folder / name).is_file() for name in (CONFIG_FILE, "config.json")):
        raise ReftuneError(f"judge {folder}: this folder has neither {CONFIG_FILE} nor config.json: {_FORMS}.")
    classifier = (load_classifier if (folder / CONFIG_FILE).is_file() else load_plain_classifier)(folder)
    names = classifier.scheme.names
    if names and label is None:
        usual = [name for name in names if name.lower() in _ACCEPTING]
        if len(usual) != 1:
            raise ReftuneError(f"judge {folder}: which class is accepted? Write {folder}:CLASS, of {', '.join(names)}.")
        label = usual[0]
    elif label is not None and label not in names:
        raise ReftuneError(f"judge {folder} has no class {label!r}; its classes are {', '.join(names) or 'numbers'}.")

    def judge(answers: Sequence[str]) -> list[bool]:
        found = [one.label for one in predict(classifier, [LabelledText(text or " ", 0) for text in answers])]
        return [(float(one) > 0.5) if label is None else one == label for one in found]

    return judge
