"""The row plan (`reftune.engine.row_plan`), under the name by which an inference engine's plug-in imports it."""

from reftune.engine.row_plan import (
    ENDLESS,
    EditedRange,
    Run,
    Tokens,
    edited_ranges,
    edited_runs,
    edits_inside,
    row_slots,
)

__all__ = ["ENDLESS", "EditedRange", "Run", "Tokens", "edited_ranges", "edited_runs", "edits_inside", "row_slots"]
