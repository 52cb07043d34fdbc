"""Several adapters at once, each with a strength: ``0.5*pirate + 0.3*formal - terse``."""

from __future__ import annotations

import math
import re

from reftune.errors import ReftuneError

_SIGN = re.compile(r"\s+([+-])\s+")
_TERM = re.compile(r"\s*(?P<sign>[+-]?)\s*(?:(?P<weight>\d+(?:\.\d*)?|\.\d+)\s*\*\s*)?(?P<name>[^\s+-].*?)\s*")
MOST_TERMS = 16


def parse_expression(text: str) -> list[tuple[str, float]]:
    """The adapters of an expression with their strengths, in order; of one named twice, the sum.

    A term is a name, or ``number*name``. Between terms stands ``+`` or ``-`` with a space on both sides, because names
    may hold hyphens.

    Raises:
        ReftuneError: a term that is neither, a strength that is not finite, or more than 16 terms.
    """
    parts = _SIGN.split(text)
    terms: dict[str, float] = {}
    for sign, part in zip(["+", *parts[1::2]], parts[::2], strict=True):
        found = _TERM.fullmatch(part)
        if found is None or "*" in found["name"]:
            raise ReftuneError(f"adapter expression {text!r}: {part.strip()!r} is no term; write name or 0.5*name.")
        weight = float(found["weight"] or 1) * (-1 if (sign == "-") != (found["sign"] == "-") else 1)
        if not math.isfinite(weight):
            raise ReftuneError(f"adapter expression {text!r}: the strength of {found['name']!r} is not finite.")
        terms[found["name"]] = terms.get(found["name"], 0.0) + weight
    if len(terms) > MOST_TERMS:
        raise ReftuneError(f"adapter expression {text!r}: {len(terms)} adapters at once; at most {MOST_TERMS}.")
    return list(terms.items())
