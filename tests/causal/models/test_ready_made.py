import itertools
import random

import pytest

from reftune.causal.counterfactuals import factual
from reftune.causal.models import addition, hierarchical_equality, indirect_object, natural_logic, price_tagging
from reftune.causal.models.indirect_object import sentence
from reftune.causal.models.natural_logic import RELATIONS, negated, quantified, sentences
from reftune.causal.models.prices import price_question
from reftune.errors import ReftuneError


def test_hierarchical_equality_compares_two_comparisons():
    model = hierarchical_equality(5)
    assert model.run({"w": 1, "x": 1, "y": 2, "z": 2})["same"]
    assert not model.run({"w": 1, "x": 1, "y": 2, "z": 3})["same"]
    assert model.run({"w": 1, "x": 1, "y": 2, "z": 3}, {"right": True})["same"]


def test_addition_carries_into_the_next_digit():
    model = addition(2)
    for a, b in itertools.product(range(0, 100, 7), range(0, 100, 9)):
        assert model.run({"a0": a % 10, "a1": a // 10, "b0": b % 10, "b1": b // 10})["total"] == a + b
    assert model.run({"a0": 1, "a1": 1, "b0": 1, "b1": 1}, {"carry0": 1})["total"] == 32


def test_a_price_is_inside_when_both_bounds_allow_it():
    model = price_tagging()
    settings = factual(model, 300)
    assert all(s["inside"] == (s["low"] <= s["amount"] <= s["high"]) for s in settings)
    assert 70 < sum(s["inside"] for s in settings) < 130
    told = price_tagging(verdict=True)
    assert [told.run({"low": 5, "high": 8, "amount": a})["verdict"] for a in (4, 5, 8, 9)] == [
        "below", "inside", "inside", "above",
    ]  # fmt: skip
    assert "between 1.20 and 5.00 dollars" in price_question({"low": 120, "high": 500, "amount": 99})


def test_the_indirect_object_is_the_name_that_does_not_come_again():
    model = indirect_object()
    for setting in factual(model, 50):
        assert {setting["subject"], setting["answer"]} == {setting["first"], setting["second"]}
        assert setting["subject"] != setting["answer"]
    text = sentence({"first": "Mary", "second": "John", "subject": "John", "place": "store", "thing": "drink"})
    assert text == "When Mary and John went to the store, John gave a drink to"
    with pytest.raises(ReftuneError, match="at least two different names"):
        indirect_object(names=["Mary"])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("equivalence", "equivalence", "every", "some"), "entailment"),
        (("equivalence", "equivalence", "no", "some"), "contradiction"),
        (("equivalence", "equivalence", "every", "no"), "alternation"),
        (("equivalence", "equivalence", "some", "not every"), "cover"),
        (("entailment", "equivalence", "every", "every"), "reverse entailment"),
        (("equivalence", "entailment", "every", "every"), "entailment"),
        (("entailment", "entailment", "some", "some"), "entailment"),
        (("equivalence", "entailment", "no", "no"), "reverse entailment"),
        (("independence", "equivalence", "every", "every"), "independence"),
    ],
)
def test_quantifiers_project_relations_as_logic_says(arguments, expected):
    assert quantified(*arguments) == expected


def test_negating_both_sides_twice_changes_nothing():
    for relation in RELATIONS:
        assert negated(negated(relation, True, True), True, True) == relation
        assert negated(negated(relation, True, False), True, False) == relation


def test_natural_logic_is_right_about_worlds_that_are_drawn_at_random():
    """In no world is an entailment's premise true and its hypothesis false, nor are contradictory sentences both true."""
    model, rng = natural_logic(), random.Random(0)
    labels = set()
    for setting in factual(model, 300, seed=1):
        labels.add(setting["label"])
        for _ in range(10):
            premise, hypothesis = _true_in_random_world(setting, rng)
            if setting["label"] == "entailment":
                assert hypothesis or not premise, sentences(setting)
            if setting["label"] == "contradiction":
                assert not (premise and hypothesis), sentences(setting)
    assert labels == {"entailment", "contradiction", "neutral"}


def _true_in_random_world(setting, rng):
    people, things = range(4), range(4)
    fact = {}

    def holds(*key):
        return fact.setdefault(key, rng.random() < 0.7)

    def true(side):
        def word(name):
            return setting[f"{side}_{name}"]

        def quantify(quantifier, members, predicate):
            found = [predicate(member) for member in members]
            return {"some": any(found), "every": all(found), "no": not any(found), "not every": not all(found)}[
                quantifier
            ]

        def members(role, domain):
            noun, adjective = word(f"{role}_noun"), word(f"{role}_adjective")
            found = [m for m in domain if holds(noun, role, m) and (not adjective or holds(adjective, role, m))]
            # Phrases name something: the fourth is of every kind (so that any two phrases have it in common).
            return found or [domain[-1]]

        def acts(person, thing):
            return holds(word("verb"), person, thing) and (not word("adverb") or holds(word("adverb"), person, thing))

        def clause(person):
            found = quantify(word("object_quantifier"), objects, lambda thing: acts(person, thing))
            return found != word("negated")

        objects = members("object", things)
        return quantify(word("subject_quantifier"), members("subject", people), clause)

    for role, domain in (("subject", people), ("object", things)):
        for side in "ph":
            fact[setting[f"{side}_{role}_noun"], role, domain[-1]] = True
            if setting[f"{side}_{role}_adjective"]:
                fact[setting[f"{side}_{role}_adjective"], role, domain[-1]] = True
    return true("p"), true("h")
