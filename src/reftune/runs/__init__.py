"""A recipe carried out, from a file of rows to an adapter's folder.

Open `recipe.py` for what can be set (every flag and YAML key is a field there), `recipe_values.py` for how values are
read, `completion.py`, `classification.py` and `preferences.py` for the kinds of run, `steps.py` for what they share,
`output_folder.py` for what happens to files, `model_card.py` for the README that a run writes, `demo.py` for
`reftune demo`, `processes.py` for several processes that train together, `jobs.py` for several
runs at a time.

Nothing here imports `cli`, `comparison` or `sweeps`, which are built on it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from reftune.runs.recipe import TrainRecipe
    from reftune.runs.steps import TrainedRun


def run_training(recipe: TrainRecipe, console: Console | None = None) -> TrainedRun:
    """Train as the recipe says and write the output folder.

    Args:
        recipe: the recipe.
        console: where to print (`show` and the progress); standard error by default.

    Raises:
        ReftuneError: anything the user can mend; what the output folder held before is whole then.
        TrainingInterrupted: after Ctrl-C in training.
    """
    from reftune.errors import ReftuneError
    from reftune.output import terminal
    from reftune.runs import processes
    from reftune.runs.recipe import PREFERENCES

    if recipe.adapter_column is not None:
        raise ReftuneError(f"adapter_column={recipe.adapter_column!r}: many users are trained by `reftune.users.run`.")
    console, recipe = console or terminal.console(stderr=True), processes.as_launched(recipe)
    with processes.together(recipe):
        if recipe.task == "classification":
            from reftune.runs.classification import run_classification

            return run_classification(recipe, console)
        if recipe.objective in PREFERENCES:
            from reftune.runs.preferences import run_preferences

            return run_preferences(recipe, console)
        from reftune.runs.completion import run_completion

        return run_completion(recipe, console)
