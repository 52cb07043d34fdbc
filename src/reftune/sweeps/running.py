"""Carry out a sweep: ask, train, tell, keep the best, and write what was found."""

from __future__ import annotations

import hashlib
import math
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console

from reftune.errors import ReftuneError
from reftune.output import terminal
from reftune.output.files import write_text
from reftune.output.locks import LOCK_FILE, only_writer, refuse_if_locked
from reftune.output.targets import check_folder_target
from reftune.runs.output_folder import OutputPlace, begin_output, readable_disk_errors
from reftune.runs.steps import write_results
from reftune.sweeps.progress import SweepProgress
from reftune.sweeps.recipe import SweepRecipe
from reftune.sweeps.records import TrialRecord, trial_records
from reftune.sweeps.report import write_report, write_table
from reftune.sweeps.space import label_of
from reftune.sweeps.study import JOURNAL_FILE, Study, require_packages
from reftune.sweeps.trial_runs import EpochWatch, FinishedTrial, TrialRunner
from reftune.training.prefix.store import PrefixStore

BEST_RECIPE, BEST_FOLDER = "best.yaml", "best"
_TRIALS_FOLDER = "trials"
_TO_BE_SURE = 3
"""Failures from the first trial on, without any success, after which the sweep is broken off."""
_NOT_COMPARED = ("output", "overwrite", "tensorboard", "wandb", "log_every", "device", "prefix_reuse")


class SweepInterrupted(KeyboardInterrupt):
    """Ctrl-C in a sweep; the message says what is saved and how to go on."""


@dataclass(frozen=True)
class SweepResult:
    """What a sweep came to.

    Attributes:
        folder: where everything is.
        trials: all of them, in order.
        best: the one with the lowest loss; None where none was trained to its end.
        importance: share of each searched field, empty where there are too few trials to tell.
    """

    folder: Path
    trials: list[TrialRecord]
    best: TrialRecord | None
    importance: dict[str, float]


def run_sweep(sweep: SweepRecipe, more: int | None = None, console: Console | None = None) -> SweepResult:
    """Train trials until there are as many as the recipe says, and write the output folder.

    A folder that holds trials of the same sweep is gone on with. In it lie `study.jsonl` (the trials), `trials.csv`,
    `best.yaml` (a recipe for `reftune train`), `best/` (the best trial's adapter), `SWEEP.md` and its pictures.

    Args:
        sweep: the sweep.
        more: train so many more trials than there are, whatever the recipe says.
        console: where to print the progress; standard error by default.

    Raises:
        ReftuneError: anything the user can mend.
        SweepInterrupted: after Ctrl-C.
    """
    require_packages()
    console = console or terminal.console(stderr=True)
    folder = Path(sweep.base.output).expanduser()
    base = sweep.base
    check_folder_target(
        folder, "output=", (JOURNAL_FILE, BEST_RECIPE, LOCK_FILE), [base.train_file, base.eval_file, sweep.source],
        base.model,
    )  # fmt: skip
    refuse_if_locked(folder)
    store = PrefixStore()
    try:
        runner = TrialRunner(sweep, store)
        identity = _identity(sweep, runner)
        runner.check()
        with only_writer(folder):
            with readable_disk_errors(folder):
                if base.overwrite:
                    _forget(folder)
                study = Study(sweep, folder, identity)
            wanted = len(study.trials()) + more if more is not None else sweep.options.trials
            _Sweep(sweep, folder, study, runner, console).go_on(wanted)
            return _conclude(sweep, folder, study)
    finally:
        store.close()


class _Sweep:
    """One call's trials."""

    def __init__(self, sweep: SweepRecipe, folder: Path, study: Study, runner: TrialRunner, console: Console) -> None:
        self._sweep, self._folder, self._study, self._runner = sweep, folder, study, runner
        self._progress = SweepProgress(console)

    def go_on(self, wanted: int) -> None:
        """Train until `wanted` trials are there, time is up, or every combination was tried."""
        limit = self._sweep.options.timeout
        deadline = math.inf if limit is None else time.monotonic() + 60 * limit
        try:
            with self._progress.running(len(self._study.trials()), wanted, self._best_text()):
                while len(self._study.trials()) < wanted:
                    if time.monotonic() >= deadline:
                        self._progress.say(f"No further trial: timeout of {limit:g} minutes.")
                        break
                    asked = self._study.ask()
                    if asked is None:
                        self._progress.say("No further trial: every combination was tried.")
                        break
                    self._train(*asked)
                    self._after_trial()
        except KeyboardInterrupt:
            raise SweepInterrupted(self._interrupted()) from None

    def _train(self, trial: Any, settings: dict[str, Any]) -> None:
        number = trial.number
        self._progress.begin_trial(number, settings)
        began = time.monotonic()
        pruned = False

        def on_epoch(epoch: int, loss: float, last: bool) -> bool:
            nonlocal pruned
            worse = math.isfinite(loss) and self._study.report(trial, epoch, loss)
            pruned = worse and not last
            return pruned

        output = self._folder / _TRIALS_FOLDER / f"{number:04d}"
        watch = EpochWatch(self._progress.step, on_epoch)
        try:
            recipe = self._sweep.trial(settings, output)
            with self._runner.trained(recipe, watch) as done:
                self._note(trial, done, time.monotonic() - began)
                loss = done.metrics["eval_loss"]
                if pruned:
                    self._study.prune(trial)
                elif loss is None or not math.isfinite(loss):
                    self._study.fail(trial, f"eval loss {loss}")
                else:
                    best = self._study.best()
                    if best is None or loss < best.value:
                        self._keep(done, number)
                    self._study.complete(trial, loss)
        except (ReftuneError, torch.OutOfMemoryError) as error:
            self._study.fail(trial, str(error).splitlines()[0])
        finally:
            shutil.rmtree(output, ignore_errors=True)

    def _note(self, trial: Any, done: FinishedTrial, seconds: float) -> None:
        store = done.metrics["prefix_store"]
        facts = {
            "seconds": round(seconds, 3),
            "trainable_parameters": done.metrics["trainable_parameters"],
            "prefix_reuse": done.metrics["prefix_reuse"],
            "prefix_hits": store.get("hits", 0),
            "prefix_misses": store.get("misses", 0),
        }
        for name, value in facts.items():
            trial.set_user_attr(name, value)

    def _keep(self, done: FinishedTrial, number: int) -> None:
        best = replace(done.recipe, output=str(self._folder / BEST_FOLDER), overwrite=False)
        folder = Path(best.output)
        with readable_disk_errors(self._folder):
            place = OutputPlace(folder, folder / ".new", None)
            begin_output(best, place, {})
            write_results(best, place, done.trainer, {**done.metrics, "trial": number}, done.tokenizer)
            loss = done.metrics["eval_loss"]
            head = f"# Trial {number} of the sweep in {self._sweep.base.output}: held-out loss {loss:.4f}.\n"
            how = f"#   reftune train {self._folder / BEST_RECIPE}\n"
            write_text(self._folder / BEST_RECIPE, head + how + best.to_yaml())

    def _after_trial(self) -> None:
        records = trial_records(self._study)
        with readable_disk_errors(self._folder):
            write_table(records, self._folder)
        self._progress.end_trial(records[-1], len(records), self._best_text())
        if len(records) >= _TO_BE_SURE and all(record.state == "failed" for record in records):
            raise ReftuneError(f"The first {len(records)} trials failed; the last one: {records[-1].note}")

    def _best_text(self) -> str:
        best = self._study.best()
        return "" if best is None else f"best {best.value:.4f} (trial {best.number})"

    def _interrupted(self) -> str:
        self._study.give_up_unfinished()
        done = len(self._study.trials())
        if done:
            _conclude(self._sweep, self._folder, self._study)
        saved = f"{done} trial{'s' if done != 1 else ''}" if done else "No trial yet"
        return (
            f"Interrupted. Saved in {self._folder}: {saved}. Go on with the same command: "
            f"reftune sweep {self._sweep.source} --output {self._sweep.base.output}"
        )


def _conclude(sweep: SweepRecipe, folder: Path, study: Study) -> SweepResult:
    records = trial_records(study)
    best = study.best()
    found = next((record for record in records if best is not None and record.number == best.number), None)
    importance = study.importance()
    with readable_disk_errors(folder):
        write_table(records, folder)
        write_report(sweep, folder, records, found, importance)
        shutil.rmtree(folder / _TRIALS_FOLDER, ignore_errors=True)
    return SweepResult(folder, records, found, importance)


def _identity(sweep: SweepRecipe, runner: TrialRunner) -> dict[str, Any]:
    """What makes trials comparable: all that is fixed, what is searched, and the rows."""
    rows = hashlib.blake2b(repr(runner.rows(sweep.base)).encode(), digest_size=8).hexdigest()
    values: dict[str, Any] = yaml.safe_load(sweep.base.to_yaml())
    fixed = {name: value for name, value in values.items() if name not in (*_NOT_COMPARED, *sweep.space)}
    return {**fixed, "search": {name: _plain(spec) for name, spec in sweep.search.items()}, "rows": rows}


def _plain(spec: Any) -> Any:
    """A searched field's options as plain data."""
    return {str(k): v for k, v in spec.items()} if isinstance(spec, dict) else [label_of(value) for value in spec]


def _forget(folder: Path) -> None:
    """**Remove** an earlier sweep's trials, so that this one begins anew."""
    for name in (BEST_FOLDER, _TRIALS_FOLDER):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in (JOURNAL_FILE, BEST_RECIPE):
        (folder / name).unlink(missing_ok=True)
