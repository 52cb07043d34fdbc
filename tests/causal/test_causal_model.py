import random

import pytest

from reftune.causal.counterfactuals import counterfactuals, factual, majority_share
from reftune.causal.model import CausalModel, Variable
from reftune.causal.models import hierarchical_equality
from reftune.errors import ReftuneError


def chain() -> CausalModel:
    return CausalModel(
        [
            Variable("total", lambda double, y: double + y, ("double", "y")),
            Variable("x", values=(0, 1, 2)),
            Variable("y", values=(0, 1, 2)),
            Variable("double", lambda x: 2 * x, ("x",), (0, 2, 4)),
        ]
    )


def test_variables_are_ordered_after_their_parents_whatever_the_order_given():
    assert chain().order == ("x", "y", "double", "total")
    assert (chain().inputs, chain().outputs) == (("x", "y"), ("total",))


def test_an_intervention_holds_whatever_the_parents_are():
    assert chain().run({"x": 1, "y": 2})["total"] == 4
    assert chain().run({"x": 1, "y": 2}, {"double": 4}) == {"x": 1, "y": 2, "double": 4, "total": 6}


def test_an_interchange_takes_each_value_from_its_own_source():
    found = chain().interchange({"x": 0, "y": 0}, {"double": {"x": 2, "y": 1}, "y": {"x": 0, "y": 2}})
    assert (found["double"], found["y"], found["total"]) == (4, 2, 6)


def test_a_cycle_is_refused_and_named():
    a, b = Variable("a", lambda b: b, ("b",)), Variable("b", lambda a: a, ("a",))
    with pytest.raises(ReftuneError, match="acyclic, but a -> b -> a|acyclic, but b -> a -> b"):
        CausalModel([a, b])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: CausalModel([Variable("a"), Variable("a")]), "'a' is given twice"),
        (lambda: CausalModel([Variable("a", len, ("b",))]), "parent 'b', which is not a variable"),
        (lambda: Variable("a", len), "'a': an input has neither"),
        (lambda: chain().run({"x": 1}), "input 'y' has no value"),
        (lambda: chain().run({"x": 9, "y": 0}), "'x' cannot be 9"),
        (lambda: chain().run({"x": 1, "y": 0}, {"doble": 1}), "'doble' is not in this causal model"),
        (lambda: counterfactuals(chain(), 3, []), "name at least one variable"),
        (lambda: counterfactuals(chain(), 3, ["double"], keep=lambda _: False), "relax them"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ReftuneError, match=message):
        call()


def test_live_paths_leave_out_what_makes_no_difference():
    model = CausalModel(
        [
            Variable("a", values=(False, True)),
            Variable("b", values=(False, True)),
            Variable("both", lambda a, b: a and b, ("a", "b"), (False, True)),
        ]
    )
    assert model.live_paths(model.run({"a": True, "b": False})) == [["b", "both"]]
    assert len(model.live_paths(model.run({"a": True, "b": True}))) == 2
    assert model.live_paths(model.run({"a": False, "b": False})) == []


def test_counterfactuals_agree_with_the_interchange_and_change_the_output_often_enough():
    model = hierarchical_equality(10)
    found = counterfactuals(model, 200, ["left", "right"], seed=3)
    assert all(example.setting == model.interchange(example.base, example.sources) for example in found)
    assert sum(example.setting["same"] != example.base_setting["same"] for example in found) >= 100
    assert {tuple(example.sources) for example in found} == {("left",), ("right",), ("left", "right")}
    assert 0.5 <= majority_share(found, "same") < 0.7
    assert found == counterfactuals(model, 200, ["left", "right"], seed=3)


def test_one_variable_at_a_time():
    found = counterfactuals(hierarchical_equality(10), 50, ["left", "right"], together=False)
    assert {len(example.sources) for example in found} == {1}


def test_sampling_follows_the_seed_and_the_sampler():
    model = hierarchical_equality(50)
    assert model.sample(5) == model.sample(random.Random(5))
    share = sum(setting["left"] for setting in factual(model, 400)) / 400
    assert 0.4 < share < 0.6
