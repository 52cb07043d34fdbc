"""What a sweep varies: drawn inside its bounds, each setting once."""

from __future__ import annotations

import random

import pytest

import reftune
from reftune.sweeps.space import Choices, Range, draw_distinct, label_of, read_range, settings_key


def test_lists_are_written_out_and_scalars_stay():
    assert [label_of(v) for v in ([10, 14], "all", 8, None, True)] == ["10,14", "all", 8, None, True]


@pytest.mark.parametrize(
    "options",
    [Range(1e-4, 1e-2, True, None, False), Range(0.0, 1.0, False, 0.3, False), Range(1, 16, True, None, True),
     Range(2, 9, False, 3, True)],
    ids=str,
)  # fmt: skip
def test_draws_stay_inside_the_bounds_and_on_the_steps(options: Range):
    drawn = [options.draw(random.Random(seed)) for seed in range(200)]
    assert all(options.low <= value <= options.high for value in drawn) and len(set(drawn)) > 2
    if options.step:
        assert all(
            abs((v - options.low) / options.step - round((v - options.low) / options.step)) < 1e-9 for v in drawn
        )
    if options.whole:
        assert all(isinstance(value, int) for value in drawn)


def test_a_logarithmic_range_draws_every_decade_alike():
    options = Range(1e-4, 1e-2, True, None, False)
    rng = random.Random(0)
    low = sum(options.draw(rng) < 1e-3 for _ in range(2000))
    assert 900 < low < 1100


def test_draws_are_distinct_and_those_that_edit_at_one_place_follow_each_other():
    space = {
        "rank": Choices({1: 1, 2: 2, 4: 4}),
        "layers": Choices({"all": "all", "0,1": [0, 1]}),
        "lr": Choices({0.1: 0.1, 0.2: 0.2}),
    }
    drawn = draw_distinct(space, 8, random.Random(0), set())
    assert len({settings_key(space, one) for one in drawn}) == 8
    layers = [one["layers"] for one in drawn]
    assert layers == sorted(layers, key=["all", "0,1"].index)
    assert len(draw_distinct(space, 50, random.Random(0), set())) == 12, "there are no more"
    taken = {settings_key(space, one) for one in draw_distinct(space, 12, random.Random(0), set())}
    assert draw_distinct(space, 1, random.Random(1), taken) == []


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"low": 1, "high": 1}, "low=1 must be below high=1"),
        ({"low": 2, "high": 1}, "low=2 must be below high=1"),
        ({"low": 1}, "high is missing"),
        ({"low": 0, "high": 1, "log": True}, "must be above 0 where log"),
        ({"low": 1, "high": 2, "log": "yes"}, "write true or false"),
        ({"low": 1, "high": 2, "step": 5}, "step=5"),
        ({"low": 1, "high": 2, "step": 0.5, "log": True}, "none with log"),
        ({"min": 1, "high": 2}, "did you mean low"),
    ],
)
def test_a_wrong_range_says_what_is_wrong(given: dict, words: str):
    with pytest.raises(reftune.ReftuneError, match=words) as error:
        read_range("lr", given, whole=False, read=float)
    assert str(error.value).startswith("search.lr")
