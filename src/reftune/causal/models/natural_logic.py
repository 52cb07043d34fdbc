"""Multiply-quantified natural language inference, computed by the relations of natural logic.

A premise such as ``not every sad baker does not loudly eat no fresh bread`` is compared with a hypothesis of the same
shape, word by word and then upwards. How two phrases relate is the set of truth values that the two may have together:
"bakers" against "people" allows (1, 1), (0, 1) and (0, 0), which is entailment. Composition needs no table typed by
hand: negation flips a coordinate, and a quantifier's relation is found by going through all small universes.

Source of the task: Geiger et al., "Posing Fair Generalization Tasks for Natural Language Inference" (arXiv 1911.00811);
of the relations: MacCartney and Manning (2009).
"""

from __future__ import annotations

import random
from collections.abc import Collection
from functools import cache

from reftune.causal.model import CausalModel, Setting, Variable

Relation = frozenset[tuple[bool, bool]]
"""The pairs of truth values (premise, hypothesis) that can occur."""

_T: bool = True
_F: bool = False
RELATIONS: dict[str, Relation] = {
    "equivalence": frozenset({(_T, _T), (_F, _F)}),
    "entailment": frozenset({(_T, _T), (_F, _T), (_F, _F)}),
    "reverse entailment": frozenset({(_T, _T), (_T, _F), (_F, _F)}),
    "contradiction": frozenset({(_T, _F), (_F, _T)}),
    "alternation": frozenset({(_T, _F), (_F, _T), (_F, _F)}),
    "cover": frozenset({(_T, _T), (_T, _F), (_F, _T)}),
    "independence": frozenset({(_T, _T), (_T, _F), (_F, _T), (_F, _F)}),
}
_NAMES = {relation: name for name, relation in RELATIONS.items()}
QUANTIFIERS = ("some", "every", "no", "not every")
WORDS: dict[str, tuple[str, ...]] = {
    "subject_noun": ("baker", "doctor", "student", "pilot"),
    "subject_adjective": ("", "sad", "tall", "young"),
    "adverb": ("", "loudly", "quickly", "gladly"),
    "verb": ("eats", "sells", "paints", "breaks"),
    "object_adjective": ("", "fresh", "old", "small"),
    "object_noun": ("cake", "chair", "bottle", "rock"),
}


def name_of(pairs: Collection[tuple[bool, bool]]) -> str:
    """The natural-logic name of the relation that allows exactly these pairs (independence where it has none)."""
    return _NAMES.get(frozenset(pairs), "independence")


def modified(head: str, premise_modifier: str, hypothesis_modifier: str) -> str:
    """Relation of two phrases from their heads' relation and their modifiers, each of which narrows its head."""
    if head != "equivalence":
        return "independence"
    if premise_modifier == hypothesis_modifier:
        return "equivalence"
    if not premise_modifier:
        return "reverse entailment"
    return "entailment" if not hypothesis_modifier else "independence"


def negated(relation: str, premise: bool, hypothesis: bool) -> str:
    """Relation after negating either side, both or none."""
    return name_of([(p != premise, h != hypothesis) for p, h in RELATIONS[relation]])


@cache
def quantified(nouns: str, predicates: str, premise: str, hypothesis: str) -> str:
    """Relation of ``premise(N1, P1)`` and ``hypothesis(N2, P2)``, from the relations of N1 to N2 and of P1 to P2.

    An individual is in or out of each of the four sets, as far as the two relations allow; a universe is any set of
    kinds of individuals in which both nouns name something.
    """
    kinds = [(n1, n2, p1, p2) for n1, n2 in RELATIONS[nouns] for p1, p2 in RELATIONS[predicates]]
    pairs: set[tuple[bool, bool]] = set()
    for included in range(1, 2 ** len(kinds)):
        universe = [kind for index, kind in enumerate(kinds) if included >> index & 1]
        first = {p1 for n1, _, p1, _ in universe if n1}
        second = {p2 for _, n2, _, p2 in universe if n2}
        if first and second:
            pairs.add((_holds(premise, first), _holds(hypothesis, second)))
            if len(pairs) == 4:
                break
    return name_of(pairs)


def _holds(quantifier: str, found: set[bool]) -> bool:
    """Whether a quantifier is true of a noun whose instances have these values of the predicate."""
    some, every = True in found, False not in found
    return {"some": some, "every": every, "no": not some, "not every": not every}[quantifier]


def label(relation: str) -> str:
    """The inference label of a relation."""
    if relation in ("equivalence", "entailment"):
        return "entailment"
    return "contradiction" if relation in ("contradiction", "alternation") else "neutral"


def natural_logic() -> CausalModel:
    """Inputs ``p_<word>`` and ``h_<word>``; relations of noun, verb and object phrases, then of ever larger clauses.

    ``subject``, ``action`` and ``object`` relate the phrases with their modifiers, ``object_clause`` adds the object's
    quantifier, ``negation`` the negation, ``sentence`` the subject's quantifier; ``label`` is the answer.
    """
    relations, truth = tuple(RELATIONS), (False, True)
    words = {**WORDS, "subject_quantifier": QUANTIFIERS, "object_quantifier": QUANTIFIERS, "negated": truth}
    inputs = [Variable(f"{side}_{word}", values=values) for word, values in words.items() for side in "ph"]

    def pair(word: str) -> tuple[str, str]:
        return f"p_{word}", f"h_{word}"

    def same(premise: str, hypothesis: str) -> str:
        return "equivalence" if premise == hypothesis else "independence"

    def phrase(name: str, head: str, modifier: str) -> list[Variable]:
        return [
            Variable(head, same, pair(head), relations),
            Variable(name, modified, (head, *pair(modifier)), relations),
        ]

    def sample(rng: random.Random) -> Setting:
        drawn: Setting = {}
        for word, values in words.items():
            premise = rng.choice(values)
            equal = rng.random() < (0.9 if word in ("subject_noun", "verb", "object_noun") else 0.5)
            drawn[f"p_{word}"], drawn[f"h_{word}"] = premise, premise if equal else rng.choice(values)
        return drawn

    return CausalModel(
        [
            *inputs,
            *phrase("subject", "subject_noun", "subject_adjective"),
            *phrase("action", "verb", "adverb"),
            *phrase("object", "object_noun", "object_adjective"),
            Variable("object_clause", quantified, ("object", "action", *pair("object_quantifier")), relations),
            Variable("negation", negated, ("object_clause", *pair("negated")), relations),
            Variable("sentence", quantified, ("subject", "negation", *pair("subject_quantifier")), relations),
            Variable("label", label, ("sentence",), ("entailment", "contradiction", "neutral")),
        ],
        sample,
    )


def sentences(inputs: Setting) -> tuple[str, str]:
    """Premise and hypothesis in words."""
    order = ("subject_quantifier", "subject_adjective", "subject_noun", "negated", "adverb", "verb")
    order += ("object_quantifier", "object_adjective", "object_noun")

    def text(side: str) -> str:
        words = [inputs[f"{side}_{word}"] for word in order]
        return " ".join("does not" if word is True else word for word in words if word)

    return text("p"), text("h")
