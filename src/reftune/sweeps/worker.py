"""One of a sweep's jobs, a process: `python -m reftune.sweeps.worker FOLDER TRIALS UNTIL`.

Each has a base model and a prefix store of its own. What they share is the study, Optuna's journal in the folder, and a
lock by which they take turns where one chooses a trial or keeps the best.
"""

from __future__ import annotations

import sys
from pathlib import Path

from filelock import FileLock
from rich.console import Console

from reftune.errors import ReftuneError
from reftune.sweeps.progress import SweepProgress
from reftune.sweeps.recipe import resolve_sweep
from reftune.sweeps.running import FAILED, TRIALS_FOLDER, TRIALS_RECIPE, Trials
from reftune.sweeps.study import Study
from reftune.sweeps.trial_runs import TrialRunner
from reftune.training.prefix.store import PrefixStore


def main(arguments: list[str]) -> int:
    """Train trials until there are as many as asked for, a line each on standard output."""
    folder, wanted, until = Path(arguments[0]), int(arguments[1]), float(arguments[2])
    store = PrefixStore()
    try:
        sweep = resolve_sweep(folder / TRIALS_FOLDER / TRIALS_RECIPE)
        turn = FileLock(str(folder / TRIALS_FOLDER / "turn.lock"))
        with turn:
            study = Study(sweep, folder, None)
        progress = SweepProgress(Console(file=sys.stdout, force_terminal=False))
        Trials(sweep, folder, study, TrialRunner(sweep, store), progress, turn).go_on(wanted, until)
    except ReftuneError as error:
        print(" ".join(str(error).split()), flush=True)
        return FAILED
    except KeyboardInterrupt:
        return 130
    finally:
        store.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
