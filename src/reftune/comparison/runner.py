"""Carry out a comparison: which runs are still to do, each in a process of its own, several at a time if wanted."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from reftune.comparison.checking import Checked, check_comparison
from reftune.comparison.methods import Method
from reftune.comparison.progress import ComparisonProgress
from reftune.comparison.recipe import RECIPE_FILE, CompareRecipe
from reftune.comparison.results import RunResult, fingerprint, read_result, run_folder
from reftune.comparison.single_run import execute
from reftune.comparison.worker import MARK
from reftune.data.formats import Example
from reftune.errors import ReftuneError
from reftune.output import terminal
from reftune.output.files import write_text
from reftune.output.locks import LOCK_FILE, only_writer, refuse_if_locked
from reftune.output.targets import check_folder_target
from reftune.runs.jobs import Jobs
from reftune.runs.output_folder import readable_disk_errors
from reftune.training.prefix.store import PrefixStore

LOG_FILE = "log.txt"


class ComparisonInterrupted(KeyboardInterrupt):
    """Ctrl-C in a comparison; the message says what is done and how to go on."""


@dataclass(frozen=True)
class Comparison:
    """A comparison and what its runs came to.

    Attributes:
        recipe: what was compared.
        results: of the runs that are done, in the recipe's order of methods, then of seeds.
        held_out: the rows that the methods are judged on.
        failed: why a run gave no result, by `name, seed k`.
    """

    recipe: CompareRecipe
    results: tuple[RunResult, ...]
    held_out: tuple[Example, ...]
    failed: dict[str, str] = field(default_factory=dict)

    def of(self, method: str) -> list[RunResult]:
        """The results of a method, by seed."""
        return [result for result in self.results if result.method == method]


def run_comparison(
    recipe: CompareRecipe,
    *,
    jobs: int = 1,
    only: Sequence[str] = (),
    own_processes: bool = True,
    share_prefixes: bool = False,
    report_only: bool = False,
    console: Console | None = None,
) -> Comparison:
    """Run what is not done yet, and return everything that is.

    A run whose `result.json` answers the recipe as it is now is not repeated; the others start from nothing.

    Args:
        recipe: the comparison.
        jobs: runs at a time, each on a GPU of its own as far as they go; where they share a GPU or the CPU, their
            seconds are those of sharing.
        only: names of methods to run; the others' results are returned if they are there.
        own_processes: run each in a fresh process, so that its memory can be told; else one after another in this one,
            which spares the start (and knows edits registered here).
        share_prefixes: in this process, let edits take what earlier ones computed of the frozen model: sooner done,
            but their seconds are no longer those of a lone run.
        report_only: run nothing; return the results that are there.
        console: where progress goes; standard error by default.

    Raises:
        ReftuneError: what the user can mend, before anything runs; or every run that was tried has failed.
        ComparisonInterrupted: after Ctrl-C; finished runs are kept.
    """
    if jobs > 1 and not own_processes:
        raise ReftuneError(f"jobs={jobs}: several runs at a time need processes of their own.")
    if share_prefixes and own_processes:
        raise ReftuneError("share_prefixes: prefixes are shared within one process; run in this process.")
    console = console or terminal.console(stderr=True)
    wanted = {recipe.method(name).name for name in only} or {method.name for method in recipe.methods}
    shared = recipe.shared
    check_folder_target(
        recipe.folder, "output=", (RECIPE_FILE, "runs/*/seed*", LOCK_FILE), [shared.train_file, shared.eval_file],
        shared.model,
    )  # fmt: skip
    refuse_if_locked(recipe.folder)
    checked = check_comparison(recipe)
    done, waiting = _sort_out(recipe, checked)
    failed: dict[str, str] = {}
    todo = [] if report_only else [run for run in waiting if run[0].name in wanted]
    if todo:
        with readable_disk_errors(recipe.folder), only_writer(recipe.folder):
            recipe.folder.mkdir(parents=True, exist_ok=True)
            write_text(recipe.folder / RECIPE_FILE, _header(recipe) + recipe.to_yaml())
            runs = [run for run in recipe.runs() if run[0].name in wanted]
            shared = recipe.shared
            batches = math.ceil(len(checked.train) / shared.rows_of_a_step)
            steps = math.ceil(batches * shared.epochs)
            with ComparisonProgress(len(runs), len(runs) - len(todo), steps, console) as progress:
                store = PrefixStore() if share_prefixes else None
                try:
                    new, failed = _run_all(recipe, todo, jobs, own_processes, store, progress)
                finally:
                    if store is not None:
                        store.close()
        done |= new
        if not new:
            raise ReftuneError(_all_failed(failed))
    order = [(method.name, seed) for method in recipe.methods for seed in recipe.seeds]
    results = tuple(done[key] for key in order if key in done)
    return Comparison(recipe, results, tuple(checked.held_out), failed)


def _header(recipe: CompareRecipe) -> str:
    return f"# Written by reftune; `reftune compare {recipe.folder}` goes on with it.\n"


def _sort_out(
    recipe: CompareRecipe, checked: Checked
) -> tuple[dict[tuple[str, int], RunResult], list[tuple[Method, int]]]:
    """Results that still answer the recipe, and the runs without one."""
    done: dict[tuple[str, int], RunResult] = {}
    waiting: list[tuple[Method, int]] = []
    for method, seed in recipe.runs():
        result = read_result(run_folder(recipe, method, seed))
        if result is not None and result.fingerprint == fingerprint(recipe, method, seed, checked.data):
            done[method.name, seed] = result
        else:
            waiting.append((method, seed))
    return done, waiting


def _all_failed(failed: dict[str, str]) -> str:
    lines = [f"  {run}: {why}" for run, why in failed.items()]
    return "No run was finished:\n" + "\n".join(lines)


def run_name(method: Method, seed: int) -> str:
    """How a run is called on the screen."""
    return f"{method.name}, seed {seed}"


def _run_all(
    recipe: CompareRecipe,
    todo: list[tuple[Method, int]],
    jobs: int,
    own_processes: bool,
    store: PrefixStore | None,
    progress: ComparisonProgress,
) -> tuple[dict[tuple[str, int], RunResult], dict[str, str]]:
    results: dict[tuple[str, int], RunResult] = {}
    failed: dict[str, str] = {}
    apart = Jobs(jobs, recipe.shared.device)

    def one(run: tuple[Method, int]) -> None:
        method, seed = run
        name = run_name(method, seed)
        if apart.stopped:
            return
        progress.begin(name)
        try:
            if own_processes:
                result = _run_apart(apart, recipe, method, seed, lambda news: progress.tell(name, news))
            else:
                result = execute(
                    recipe, method, seed, lambda news: progress.tell(name, news), own_process=False, store=store
                )
        except ReftuneError as error:
            failed[name] = str(error)
            if not apart.stopped:
                progress.end(name, None, str(error))
            return
        results[method.name, seed] = result
        progress.end(name, result)

    try:
        if own_processes:
            apart.each(one, todo)
        else:
            for run in todo:
                one(run)
    except KeyboardInterrupt as interrupt:
        raise ComparisonInterrupted(
            f"Interrupted; {len(results)} of {len(todo)} runs were finished and are kept. Go on with: reftune compare "
            f"{recipe.folder}"
        ) from interrupt
    return results, failed


def _run_apart(jobs: Jobs, recipe: CompareRecipe, method: Method, seed: int, tell: Any) -> RunResult:
    """One run in a process of its own, whose news are passed on."""
    folder = run_folder(recipe, method, seed)
    folder.parent.mkdir(parents=True, exist_ok=True)
    log = folder.parent / f"seed{seed}-{LOG_FILE}"  # beside the folder, which the run clears
    command = [sys.executable, "-m", "reftune.comparison.worker", str(recipe.folder), method.name, str(seed)]
    failure = ""
    with (
        log.open("w", encoding="utf-8") as errors,
        jobs.running(command, stdout=subprocess.PIPE, stderr=errors) as process,
    ):
        assert process.stdout is not None
        with process.stdout as told:
            for line in told:
                if not line.startswith(MARK):
                    errors.write(line)
                    continue
                news = json.loads(line.removeprefix(MARK))
                failure = news.get("error", failure)
                if "error" not in news:
                    tell(news)
        status = process.wait()
    result = read_result(folder) if status == 0 else None
    if result is None:
        raise ReftuneError(failure or f"the process ended with status {status}: {_last_line(log)} (see {log})")
    log.unlink()
    return result


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"
