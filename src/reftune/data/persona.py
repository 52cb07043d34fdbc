"""The demo's dataset, a pirate captain who answers everyday questions, and a measure of being in that style.

The measure (`in_style`) is true for an answer that does all of this:

1. it uses at least 3 distinct marks of the persona, from at least 2 of the 4 categories in `MARKS`, and at least 2 of
   them are no sea words ("arr arr arr" is one mark; a plain answer about ships has sea words and little else);
2. at least half of its words, and no fewer than 6, are not marks (a bare list of marks fails);
3. distinct words are at least half of all words, and no run of four words occurs three times (a loop fails);
4. it ends like a sentence (. ! ? or a closing quote after one), unless generation stopped at its token limit.

It says nothing of whether the answer is right or sensible: read the answers for that.
"""

import json
import re
from collections import Counter
from importlib import resources

from reftune.data.formats import Example, read_examples
from reftune.data.reading import Source

PERSONA = "a pirate captain who answers every question in salty sea talk"

MARKS: dict[str, tuple[str, ...]] = {
    "exclamation": ("a+r+r+", "ahoy", "avast", "aye", "belay", "yo ho", "har har", "shiver me timbers", "blimey"),
    "address": ("matey|mateys|me hearty|me hearties", "landlubbers?", "scallywags?", "shipmates?", "swabs?"),
    "dialect": (
        "ye", "yer|yers", "yerself", "o'", "'tis|'twas|'twill", "'em", "nary", "wee", "me (?:ship|crew|deck|cabin|own)",
        r"(?:i|ye|that|it|they|there|she|he) be", r"\w{2,}in'",
    ),
    "sea": (
        "seven seas|seas?|ocean", "ships?", "crew|crewmates?", "captains?", "sails?|sailors?|sailed|sailing", "decks?",
        "anchors?", "masts?", "hulls?", "cabins?", "treasures?", "doubloons?", "cutlass", "cannons?", "rum", "galley",
        "planks?", "harbou?rs?", "tides?", "port", "overboard", "aboard", "compass", "voyage", "pirates?", "first mate",
        "fair winds?", "shanties|shanty", "barrels?", "sharks?",
    ),
}  # fmt: skip
"""Each entry is one mark: a pattern matched as whole words, whatever the case. Spellings of one word are one mark."""

_PATTERNS = {
    (category, mark): re.compile(rf"(?<![\w'])(?:{mark})(?![\w])", re.IGNORECASE)
    for category, marks in MARKS.items()
    for mark in marks
}
_WORD = re.compile(r"[\w'-]*\w[\w'-]*")
_FEW_NEUTRAL = 40
_MIN_MARKS, _MIN_CATEGORIES, _MIN_SPOKEN, _MIN_WORDS = 3, 2, 2, 6


def load_demo() -> list[Example]:
    """Return the training rows of the demo, written for this project."""
    with resources.as_file(resources.files("reftune.data") / "demo_persona.jsonl") as file:
        return read_examples(file)


def load_heldout() -> list[str]:
    """Return the prompts kept for showing the demo's result; none of them is in `load_demo()`."""
    text = (resources.files("reftune.data") / "demo_heldout.jsonl").read_text(encoding="utf-8")
    return [json.loads(line)["prompt"] for line in text.splitlines()]


def neutral_rows(source: Source | None = None, many: bool = False) -> list[Example]:
    """Plain questions with plain answers, which no persona answers: those of a file, or the package's own.

    Args:
        source: the file.
        many: of the package's own take all 160, for a mean of which little is by chance, and not the first 40.
    """
    if source is not None:
        return read_examples(source)
    with resources.as_file(resources.files("reftune.data") / "neutral.jsonl") as file:
        return read_examples(file)[: None if many else _FEW_NEUTRAL]


def style_marks(text: str) -> set[str]:
    """Return the distinct marks in `text`, each as `category: pattern` (see `MARKS`)."""
    text = _plain_quotes(text)
    return {f"{category}: {mark}" for (category, mark), pattern in _PATTERNS.items() if pattern.search(text)}


def in_style(text: str, *, hit_token_limit: bool = False) -> bool:
    """Return whether `text` is a fluent answer in the persona's style, by the four rules in this module's docstring.

    Args:
        text: the answer alone, without prompt or special tokens.
        hit_token_limit: generation stopped at its token limit, so the answer may break off mid-sentence.
    """
    text = _plain_quotes(text.strip())
    marks = style_marks(text)
    categories = [mark.partition(":")[0] for mark in marks]
    spoken = len(marks) - categories.count("sea")
    if len(marks) < _MIN_MARKS or len(set(categories)) < _MIN_CATEGORIES or spoken < _MIN_SPOKEN:
        return False
    return _is_fluent(text) and (hit_token_limit or re.search(r"[.!?][\"')*]*$", text) is not None)


def _is_fluent(text: str) -> bool:
    words = [word.lower() for word in _WORD.findall(text)]
    if len(words) < _MIN_WORDS or len(set(words)) / len(words) < 0.5:
        return False
    runs = Counter(zip(words, words[1:], words[2:], words[3:], strict=False))
    if runs and max(runs.values()) >= 3:
        return False
    rest = text
    for pattern in _PATTERNS.values():
        rest = pattern.sub(" ", rest)
    unmarked = len(_WORD.findall(rest))
    return unmarked >= _MIN_WORDS and unmarked >= len(words) / 2


def _plain_quotes(text: str) -> str:
    return text.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'").replace("\N{LEFT SINGLE QUOTATION MARK}", "'")
