"""pyreft's layouts of locations and subspaces, and the masks that they mean."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from reftune.errors import ReftuneError
from reftune.pyreft import get_intervention_locations, parse_positions
from reftune.pyreft.config import read_component
from reftune.pyreft.locations import location_masks, subspace_directions


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [  # as pyreft 0.1.0 gave them
        ({"last_position": 10, "positions": "f3+l3", "num_interventions": 2, "share_weights": True},
         [[0, 1, 2, 7, 8, 9]] * 2),
        ({"last_position": 10, "positions": "f3+l3", "num_interventions": 4}, [[0, 1, 2]] * 2 + [[7, 8, 9]] * 2),
        ({"last_position": 10, "positions": "f3+l5", "num_interventions": 2}, [[0, 1, 2, -1, -1], [5, 6, 7, 8, 9]]),
        ({"last_position": 10, "first_n": 3, "last_n": 5, "num_interventions": 2},
         [[0, 1, 2, -1, -1], [5, 6, 7, 8, 9]]),
        ({"last_position": 4, "positions": "l1", "num_interventions": 2, "share_weights": True}, [[3], [3]]),
    ],
)  # fmt: skip
def test_locations_are_laid_out_as_pyreft_lays_them_out(arguments: dict[str, Any], expected: list[list[int]]) -> None:
    assert get_intervention_locations(**arguments) == expected


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        # pyreft leaves out the middle token: [0, 1, 3, 4]
        ({"last_position": 5, "positions": "f3+l3", "share_weights": True}, [[0, 1, 2, 3, 4, -1]]),
        # pyreft halves a prefix that stands alone: [0, 1]
        ({"last_position": 5, "positions": "f4", "share_weights": True}, [[0, 1, 2, 3]]),
        # pyreft fills up with 9, the first response token
        ({"last_position": 9, "positions": "f2+l4", "num_interventions": 2, "pad_mode": "last"},
         [[0, 1, -1, -1], [5, 6, 7, 8]]),
        # pyreft edits the first response token
        ({"last_position": 1, "positions": "f2+l3", "share_weights": True}, [[0, -1, -1, -1, -1]]),
    ],
)  # fmt: skip
def test_short_prompts_are_edited_where_they_have_tokens(arguments: dict[str, Any], expected: list[list[int]]) -> None:
    found = get_intervention_locations(**arguments)
    assert [sorted(set(one)) for one in found] == [sorted(set(one)) for one in expected]
    assert [len(one) for one in found] == [len(one) for one in expected]


def test_an_odd_number_of_untied_interventions_is_refused() -> None:
    with pytest.raises(ReftuneError, match="num_interventions=3: untied interventions come in pairs"):
        get_intervention_locations(last_position=5, positions="f2+l2", num_interventions=3)


def test_positions_are_counts() -> None:
    assert parse_positions("f3+l2") == (3, 2)
    assert parse_positions("l1") == (0, 1)
    with pytest.raises(ReftuneError, match="pyreft's helpers take"):
        parse_positions("all")


ROWS = [[[1], [4]], [[0, 2], [3]]]


@pytest.mark.parametrize(
    "unit_locations",
    [{"sources->base": (None, ROWS)}, {"base": ROWS}, torch.tensor([[[1, -1], [0, 2]], [[4, -1], [3, -1]]])],
)
def test_every_spelling_of_locations_means_the_same_masks(unit_locations: Any) -> None:
    masks = location_masks(unit_locations, ["a", "b"], 2, 5)
    assert masks["a"].nonzero().tolist() == [[0, 1], [1, 4]]
    assert masks["b"].nonzero().tolist() == [[0, 0], [0, 2], [1, 3]]


def test_a_number_serves_all_and_one_row_serves_the_batch() -> None:
    assert {n: m.nonzero().tolist() for n, m in location_masks({"base": 3}, ["a", "b"], 2, 5).items()} == {
        "a": [[0, 3], [1, 3]],
        "b": [[0, 3], [1, 3]],
    }
    assert location_masks({"base": [None, [[1]]]}, ["a", "b"], 2, 5).keys() == {"b"}


@pytest.mark.parametrize(
    ("unit_locations", "message"),
    [
        ({"base": [[[1]]]}, "for 1 interventions, and the model has 2"),
        ({"base": [[[1]] * 3] * 2}, "3 rows for a batch of 2"),
        ({"base": [[[7]]] * 2}, "name token 7, and row 0 has 5, 0 to 4"),
        ({"sources": 1}, "ReFT has no source inputs"),
    ],
)
def test_locations_that_cannot_be_are_refused(unit_locations: Any, message: str) -> None:
    with pytest.raises(ReftuneError, match=message):
        location_masks(unit_locations, ["a", "b"], 2, 5)


def test_subspaces_name_directions_or_parts_of_a_partition() -> None:
    found = subspace_directions(
        [[[0, 2], [1]], [[1], [0, 1]], None], ["a", "b", "c"], [3, 4, 2], [None, ((0, 3), (3, 4)), None], 2
    )
    assert found["a"].tolist() == [[True, False, True], [False, True, False]]
    assert found["b"].tolist() == [[False, False, False, True], [True, True, True, True]]
    assert "c" not in found


@pytest.mark.parametrize(
    ("component", "layer", "expected"),
    [
        ("block_output", 8, ("block_output", 8)),
        ("model.layers[8].output", None, ("block_output", 8)),
        ("base_model.model.model.layers[8].output", None, ("block_output", 8)),
        ("model.layers[3].mlp.output", None, ("model.layers.{layer}.mlp:output", 3)),
        ("model.layers.12.self_attn.o_proj.input", None, ("model.layers.{layer}.self_attn.o_proj:input", 12)),
        ("transformer.h[2].attn", None, ("transformer.h.{layer}.attn:output", 2)),
        ("model.norm.output", None, ("model.norm:output", None)),
    ],
)
def test_components_are_read_as_names_or_paths(
    component: str, layer: int | None, expected: tuple[str, int | None]
) -> None:
    assert read_component(component, layer) == expected
