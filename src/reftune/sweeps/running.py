"""Carry out a sweep: ask, train, tell, keep the best, and write what was found."""

from __future__ import annotations

import hashlib
import math
import shutil
import subprocess
import sys
import time
from contextlib import AbstractContextManager, nullcontext
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
from reftune.runs.jobs import Jobs
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
TRIALS_FOLDER, TRIALS_RECIPE = "trials", "sweep.yaml"
FAILED = 3
"""Exit status of a job that failed in a way its user can mend; the message was told."""
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


def run_sweep(
    sweep: SweepRecipe, more: int | None = None, console: Console | None = None, jobs: int = 1
) -> SweepResult:
    """Train trials until there are as many as the recipe says, and write the output folder.

    A folder that holds trials of the same sweep is gone on with. In it lie `study.jsonl` (the trials), `trials.csv`,
    `best.yaml` (a recipe for `reftune train`), `best/` (the best trial's adapter), `SWEEP.md` and its pictures.

    Args:
        sweep: the sweep.
        more: train so many more trials than there are, whatever the recipe says.
        console: where to print the progress; standard error by default.
        jobs: trials at a time. With several, each job is a process with a base model and a prefix store of its own, and
            which trials come depends on which end first.

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
            limit = sweep.options.timeout
            until = math.inf if limit is None else time.time() + 60 * limit
            try:
                if jobs == 1:
                    Trials(sweep, folder, study, runner, SweepProgress(console)).go_on(wanted, until)
                else:
                    runner.forget()  # each job loads its own
                    _train_apart(sweep, folder, study, SweepProgress(console), jobs, wanted, until)
            except KeyboardInterrupt:
                raise SweepInterrupted(_interrupted(sweep, folder, study)) from None
            return _conclude(sweep, folder, study)
    finally:
        store.close()


class Trials:
    """Trains a study's trials in this process.

    Args:
        sweep: the sweep.
        folder: its output folder.
        study: of the folder.
        runner: trains one.
        progress: shows them.
        turn: held while a trial is chosen, and while a result is compared with the best; other processes of the same
            study hold it too.
    """

    def __init__(
        self,
        sweep: SweepRecipe,
        folder: Path,
        study: Study,
        runner: TrialRunner,
        progress: SweepProgress,
        turn: AbstractContextManager[Any] | None = None,
    ) -> None:
        self._sweep, self._folder, self._study, self._runner = sweep, folder, study, runner
        self._progress, self._turn = progress, turn or nullcontext()

    def go_on(self, wanted: int, until: float) -> None:
        """Train until `wanted` trials are there or begun, time is up, or every combination was tried.

        Args:
            wanted: trials in all.
            until: seconds since the epoch, after which none is begun.
        """
        with self._progress.running(len(self._study.trials()), wanted, best_text(self._study)):
            while True:
                if time.time() >= until:
                    self._progress.say(f"No further trial: timeout of {self._sweep.options.timeout:g} minutes.")
                    return
                with self._turn:
                    if self._study.begun() >= wanted:
                        return
                    asked = self._study.ask()
                if asked is None:
                    self._progress.say("No further trial: every combination was tried.")
                    return
                self._train(*asked)
                with self._turn:
                    self._after_trial(asked[0].number)

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

        output = self._folder / TRIALS_FOLDER / f"{number:04d}"
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
                    with self._turn:
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

    def _after_trial(self, number: int) -> None:
        records = trial_records(self._study)
        with readable_disk_errors(self._folder):
            write_table(records, self._folder)
        ended = next(record for record in records if record.number == number)
        self._progress.end_trial(ended, len(records), best_text(self._study))
        if len(records) >= _TO_BE_SURE and all(record.state == "failed" for record in records):
            raise ReftuneError(f"The first {len(records)} trials failed; the last one: {ended.note}")


def best_text(study: Study) -> str:
    """The lowest loss so far and its trial; empty before there is one."""
    best = study.best()
    return "" if best is None else f"best {best.value:.4f} (trial {best.number})"


def _interrupted(sweep: SweepRecipe, folder: Path, study: Study) -> str:
    study.give_up_unfinished()
    done = len(study.trials())
    if done:
        _conclude(sweep, folder, study)
    saved = f"{done} trial{'s' if done != 1 else ''}" if done else "No trial yet"
    return (
        f"Interrupted. Saved in {folder}: {saved}. Go on with the same command: "
        f"reftune sweep {sweep.source} --output {sweep.base.output}"
    )


def _train_apart(
    sweep: SweepRecipe, folder: Path, study: Study, progress: SweepProgress, jobs: int, wanted: int, until: float
) -> None:
    """Train until ``wanted`` trials are there, so many at a time.

    Args:
        sweep: the sweep.
        folder: its output folder.
        study: of the folder, which no other process uses yet.
        progress: shows them.
        jobs: trials at a time.
        wanted: trials in all.
        until: seconds since the epoch, after which none is begun.

    Raises:
        ReftuneError: what a job told, or that it ended; the others were ended too.
    """
    trials = folder / TRIALS_FOLDER
    apart = Jobs(jobs, sweep.base.device)
    said: set[str] = set()

    def one(job: int) -> None:
        log = trials / f"job{job}.txt"
        command = [sys.executable, "-m", "reftune.sweeps.worker", str(folder), str(wanted), str(until)]
        told = ""
        with (
            log.open("w", encoding="utf-8") as errors,
            apart.running(command, stdout=subprocess.PIPE, stderr=errors) as process,
        ):
            assert process.stdout is not None
            with process.stdout as lines:
                for line in lines:
                    told = line.rstrip("\n")
                    if told not in said:  # why no trial follows is the same for all
                        said.add(told)
                        progress.say(told)
                    progress.count(len(study.trials()), best_text(study))
            status = process.wait()
        if status == FAILED:
            raise ReftuneError(told)
        if status and not apart.stopped:
            last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
            raise ReftuneError(f"a job ended with status {status}{': ' if last else ''}{''.join(last)}")

    with readable_disk_errors(folder):
        trials.mkdir(exist_ok=True)
        write_text(trials / TRIALS_RECIPE, sweep.to_yaml())
    with progress.running(len(study.trials()), wanted, ""):
        apart.each(one, range(min(jobs, wanted - study.begun())))  # none where all are there


def _conclude(sweep: SweepRecipe, folder: Path, study: Study) -> SweepResult:
    records = trial_records(study)
    best = study.best()
    found = next((record for record in records if best is not None and record.number == best.number), None)
    importance = study.importance()
    with readable_disk_errors(folder):
        write_table(records, folder)
        write_report(sweep, folder, records, found, importance)
        shutil.rmtree(folder / TRIALS_FOLDER, ignore_errors=True)
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
    for name in (BEST_FOLDER, TRIALS_FOLDER):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in (JOURNAL_FILE, BEST_RECIPE):
        (folder / name).unlink(missing_ok=True)
