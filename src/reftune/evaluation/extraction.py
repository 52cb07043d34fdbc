"""What an answer's text says: the option that it names, its last number, its letter."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

TOLERANCE = 1e-3
"""Numbers nearer than this are the same (as in LLM-Adapters and the ReFT paper)."""

_STATED = re.compile(r"the correct answer is", re.IGNORECASE)
_NUMBER = re.compile(r"-?\d+\.?\d*")
_LETTER_STATED = re.compile(r"answer is\W*([A-E])\b", re.IGNORECASE)
_LETTER_BRACKETED = re.compile(r"\(([A-E])\)")
_LETTER = re.compile(r"\b([A-E])\b")


def option_word(text: str, words: Sequence[str]) -> str | None:
    """The first of the words (`answer1`, `true`, ...) after "the correct answer is"; without that, in the whole text.

    Returns:
        The word as it is spelt in `words`, or None.
    """
    stated = _STATED.search(text)
    known = {word.lower(): word for word in words}
    pattern = "|".join(map(re.escape, sorted(known, key=len, reverse=True)))
    found = re.search(rf"\b({pattern})\b", text[stated.end() :] if stated else text, re.IGNORECASE)
    return known[found.group(1).lower()] if found else None


def last_number(text: str) -> float | None:
    """The last number in the text, commas inside numbers removed (`1,250.5`), or None."""
    found = _NUMBER.findall(text.replace(",", ""))
    number = float(found[-1]) if found else math.nan
    return number if math.isfinite(number) else None


def letter(text: str) -> str | None:
    """The letter A to E that the text answers with: after "answer is", else the last in brackets, else the last alone.

    LLM-Adapters takes the first capital A to E of the text, whatever word it stands in.
    """
    stated = _LETTER_STATED.search(text)
    if stated:
        return stated.group(1).upper()
    found = _LETTER_BRACKETED.findall(text) or _LETTER.findall(text)
    return found[-1] if found else None


def same(extracted: str | float | None, gold: str | float) -> bool:
    """Whether an extracted answer is the gold one; numbers within `TOLERANCE`."""
    if isinstance(extracted, float) and isinstance(gold, float):
        return abs(extracted - gold) <= TOLERANCE
    return extracted == gold
