"""Sweeps: the settings with the lowest held-out loss, searched by trials that share what prefix reuse computed.

Open `recipe.py` and `space.py` for what is searched, `study.py` for the search, `trial_runs.py`, `running.py` and
`worker.py` for carrying it out, `records.py`, `report.py` and `pictures.py` for what it leaves. It must not import
`cli` or `comparison`.
"""

from typing import TYPE_CHECKING, Any

from reftune.sweeps.recipe import SweepOptions, SweepRecipe, resolve_sweep

if TYPE_CHECKING:
    from reftune.sweeps.running import SweepInterrupted, SweepResult, run_sweep

__all__ = ["SweepInterrupted", "SweepOptions", "SweepRecipe", "SweepResult", "resolve_sweep", "run_sweep"]


def __getattr__(name: str) -> Any:
    """What trains is imported where it is used: a command line asks for the recipe alone."""
    if name in __all__:
        from reftune.sweeps import running

        return getattr(running, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
