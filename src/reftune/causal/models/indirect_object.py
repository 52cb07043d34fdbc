"""Indirect object identification: who was given the drink?"""

from __future__ import annotations

import random
from collections.abc import Sequence

from reftune.causal.model import CausalModel, Setting, Variable
from reftune.errors import ReftuneError

NAMES = ("Mary", "John", "Alice", "Bob", "Emma", "Tom", "Anna", "James", "Sarah", "Peter", "Laura", "Paul")
PLACES = ("store", "park", "office", "school", "station", "garden")
THINGS = ("drink", "book", "ball", "letter", "key", "cake")


def indirect_object(
    names: Sequence[str] = NAMES, places: Sequence[str] = PLACES, things: Sequence[str] = THINGS
) -> CausalModel:
    """Inputs ``first``, ``second`` (two names) and ``subject`` (which is one of them again).

    ``repeated`` is the place, 0 or 1, of the name that comes again; ``position`` the place of the other one;
    ``answer`` its name. ``place`` and ``thing`` fill the sentence and change nothing. Source: the algorithm of Wang
    et al., "Interpretability in the Wild" (arXiv 2211.00593), section 3, whose duplicate-token and S-inhibition heads
    carry ``repeated`` and ``position``.
    """
    if len(set(names)) < 2:
        raise ReftuneError(f"names={list(names)}: at least two different names are needed")

    def sample(rng: random.Random) -> Setting:
        first, second = rng.sample(list(names), 2)
        subject = rng.choice([first, second])
        return {
            "first": first,
            "second": second,
            "subject": subject,
            "place": rng.choice(places),
            "thing": rng.choice(things),
        }

    who = tuple(names)
    return CausalModel(
        [
            Variable("first", values=who),
            Variable("second", values=who),
            Variable("subject", values=who),
            Variable("place", values=tuple(places)),
            Variable("thing", values=tuple(things)),
            Variable("repeated", lambda first, subject: int(first != subject), ("first", "subject"), (0, 1)),
            Variable("position", lambda repeated: 1 - repeated, ("repeated",), (0, 1)),
            Variable(
                "answer",
                lambda first, second, position: (first, second)[position],
                ("first", "second", "position"),
                who,
            ),
        ],
        sample,
    )


def sentence(inputs: Setting) -> str:
    """The inputs as the beginning of a sentence that the answer completes."""
    return (
        f"When {inputs['first']} and {inputs['second']} went to the {inputs['place']}, "
        f"{inputs['subject']} gave a {inputs['thing']} to"
    )
