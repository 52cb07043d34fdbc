"""The study: trials and their results in a file that outlives the process (Optuna's journal)."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from reftune.errors import ReftuneError
from reftune.runs.recipe import recipe_fields
from reftune.sweeps.recipe import SweepRecipe
from reftune.sweeps.space import Space, draw_distinct, settings_key

JOURNAL_FILE = "study.jsonl"
_NAME = "sweep"
_BEGINNING = b'{"op_code":'
"""Of each line of the journal."""
_DRAWN_FIRST = 10
"""Trials whose settings are chance; the sampler learns from them."""

logger = logging.getLogger(__name__)


def require_packages() -> None:
    """Check that what a sweep needs is installed.

    Raises:
        ReftuneError: naming the package and how to get it.
    """
    for module, package in (("optuna", "optuna"), ("sklearn", "scikit-learn")):
        if importlib.util.find_spec(module) is None:
            raise ReftuneError(f"A sweep needs {package}, which is not installed: run `pip install 'reftune[sweep]'`.")


class Study:
    """Asks for settings and takes results; a second call on the same folder goes on where the first one stopped.

    Settings of the first trials are drawn at random and queued, ordered by where they edit; the rest is the sampler's.
    Settings that were already trained are not trained again: the sampler is told the earlier result.

    Args:
        sweep: the sweep.
        folder: where the journal is.
        identity: what has to be the same for trials to be comparable; None where another process has begun the study
            and goes on with it too.

    Raises:
        ReftuneError: the folder holds a sweep of something else.
    """

    def __init__(self, sweep: SweepRecipe, folder: Path, identity: Mapping[str, Any] | None) -> None:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._optuna = optuna
        self._states = optuna.trial.TrialState
        self.space: Space = sweep.space
        self._seed = sweep.base.seed
        self._drawn_first = min(_DRAWN_FIRST, max(1, sweep.options.trials // 3))
        journal = folder / JOURNAL_FILE
        if identity is not None:
            _drop_half_line(journal)
        try:
            storage = JournalStorage(JournalFileBackend(str(journal)))
            self.study: Any = optuna.create_study(storage=storage, study_name=_NAME, load_if_exists=True)
            self.study.get_trials(deepcopy=False)
        except OSError:
            raise
        except Exception as error:  # whatever Optuna meets in a line that is not its own
            raise ReftuneError(
                f"{journal} is damaged ({type(error).__name__}: {str(error).splitlines()[:1]}): start again with "
                "--overwrite, or name another output."
            ) from None
        asked = len(self.study.get_trials(deepcopy=False))
        seed = self._seed + asked if identity is not None else None  # each of several processes draws its own
        if sweep.options.sampler == "random":
            self.study.sampler = optuna.samplers.RandomSampler(seed=seed)
        else:
            self.study.sampler = optuna.samplers.TPESampler(
                seed=seed, n_startup_trials=self._drawn_first, constant_liar=identity is None
            )
        if sweep.options.pruner == "median":
            self.study.pruner = optuna.pruners.MedianPruner(n_startup_trials=4)
        else:
            self.study.pruner = optuna.pruners.NopPruner()
        if identity is None:
            return
        before = self.study.user_attrs.get("identity")
        if before is None:
            self.study.set_user_attr("identity", dict(identity))
        else:
            _check_same(before, dict(identity), folder)
        self.give_up_unfinished()
        if asked == 0:
            for drawn in draw_distinct(self.space, self._drawn_first, random.Random(self._seed), set()):
                self.study.enqueue_trial(drawn)

    def trials(self) -> list[Any]:
        """The trials that were trained (or failed to be), in order: no repeated, waiting or interrupted ones."""
        kinds = [self._states.COMPLETE, self._states.PRUNED, self._states.FAIL]
        found = self.study.get_trials(deepcopy=False, states=kinds)
        failed = self._states.FAIL  # without an error: interrupted
        return [t for t in found if "same_as" not in t.user_attrs and (t.state != failed or "error" in t.user_attrs)]

    def begun(self) -> int:
        """How many trials were trained, or are being trained, here or in another process."""
        return len(self.trials()) + len(self._under_way())

    def _under_way(self) -> list[Any]:
        return self.study.get_trials(deepcopy=False, states=[self._states.RUNNING])

    def best(self) -> Any | None:
        """The trial with the lowest loss, or None."""
        complete = [trial for trial in self.trials() if trial.state == self._states.COMPLETE]
        return min(complete, key=lambda trial: trial.value) if complete else None

    def ask(self) -> tuple[Any, dict[str, Any]] | None:
        """The next trial and its settings; None where every combination was tried."""
        while True:
            trial = self.study.ask()
            settings = {name: options.suggest(trial, name) for name, options in self.space.items()}
            others = [*self.trials(), *(other for other in self._under_way() if other.number != trial.number)]
            known = {settings_key(self.space, t.params): t for t in others if set(t.params) == set(self.space)}
            same = known.get(settings_key(self.space, trial.params))
            if same is None:
                return trial, settings
            trial.set_user_attr("same_as", same.number)
            if same.state == self._states.COMPLETE:
                self.study.tell(trial, same.value)
            else:
                self.study.tell(trial, state=self._states.FAIL)
            waiting = self.study.get_trials(deepcopy=False, states=[self._states.WAITING])
            if not waiting:
                drawn = draw_distinct(self.space, 1, random.Random(self._seed + trial.number), set(known))
                if not drawn:
                    return None
                self.study.enqueue_trial(drawn[0])

    def report(self, trial: Any, epoch: int, loss: float) -> bool:
        """Note an epoch's loss; whether the trial is not worth going on with."""
        trial.report(loss, epoch)
        return bool(trial.should_prune())

    def complete(self, trial: Any, value: float) -> None:
        """A trial's result."""
        self.study.tell(trial, value)

    def prune(self, trial: Any) -> None:
        """A trial was stopped early."""
        self.study.tell(trial, state=self._states.PRUNED)

    def fail(self, trial: Any, reason: str) -> None:
        """A trial could not be trained; it is not tried again."""
        trial.set_user_attr("error", reason)
        self.study.tell(trial, state=self._states.FAIL)

    def give_up_unfinished(self) -> None:
        """A trial was interrupted, in this process or in one that was killed: its settings wait for their turn."""
        for trial in self.study.get_trials(states=[self._states.RUNNING]):
            self.study.tell(trial.number, state=self._states.FAIL)
            if set(trial.params) == set(self.space):
                self.study.enqueue_trial(trial.params)

    def importance(self) -> dict[str, float]:
        """Share of each searched field in what makes the loss differ (fANOVA); empty with fewer than 4 results."""
        complete = [t for t in self.trials() if t.state == self._states.COMPLETE]
        if len(complete) < 4 or len({t.value for t in complete}) < 2:
            return {}
        evaluator = self._optuna.importance.FanovaImportanceEvaluator(seed=self._seed)
        found = self._optuna.importance.get_param_importances(self.study, evaluator=evaluator)
        return {name: float(value) for name, value in found.items()}


def _drop_half_line(journal: Path) -> None:
    """**Remove** what a crash left of the last line; Optuna reads over it, but would write its next line behind it."""
    content = journal.read_bytes() if journal.is_file() else b""
    last = content[content.rfind(b"\n", 0, -1) + 1 :]
    try:
        json.loads(last)
        whole = last.endswith(b"\n")
    except ValueError:
        whole = False
    if not whole and last.startswith(_BEGINNING[: len(last)]):
        if last:
            logger.warning("%s: its last line is cut off, as after a crash, and is passed over", journal)
            os.truncate(journal, len(content) - len(last))
    elif not whole:
        raise ReftuneError(
            f"{journal} is damaged (its last line is none of a sweep): start again with --overwrite, or name another "
            "output."
        )


def _check_same(before: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    now = yaml.safe_load(yaml.safe_dump(dict(now)))
    # A setting that is newer than the folder had its default then.
    before = {item.name: item.default for item in recipe_fields() if item.name in now} | dict(before)
    for name in sorted(before.keys() | now.keys(), key=lambda name: (name != "search", name)):
        if before.get(name) != now.get(name):
            raise ReftuneError(
                f"output={str(folder)!r} holds a sweep with {name}={before.get(name)!r}, and this one has "
                f"{now.get(name)!r}: their trials cannot be compared. Name another output, or start again with "
                "--overwrite."
            )
