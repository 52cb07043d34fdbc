"""The pairs that both sides of a comparison read: bundled pirate answers against bundled plain ones, as whole texts."""

from __future__ import annotations

from reftune.data.persona import load_demo, neutral_rows


def texts() -> list[tuple[str, str]]:
    """Positive and negative text of each pair."""
    plain = neutral_rows()
    return [(one.completion, other.completion) for one, other in zip(load_demo(), plain, strict=False)]
