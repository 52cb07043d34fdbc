"""Gates: the probe against scikit-learn's, the threshold against every other, and rows as they are read."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score

from reftune.edits import ConsreftEdit, LobireftEdit, RotatedEdit
from reftune.engine.position_grammar import parse_positions
from reftune.engine.sites import find_sites
from reftune.errors import ReftuneError
from reftune.steering.contrasts import split
from reftune.steering.gates import Gate, balanced_accuracy, find_gate, gated_edit, open_shares, read_when
from reftune.steering.states import mean_states, token_states
from tests.steering.test_states import rows_of
from tests.tiny_models import CAUSAL

WIDTH = 10


def states(rows: int, apart: float, seed: int) -> np.ndarray:
    draw = np.random.default_rng(seed)
    return (draw.normal(size=(rows, WIDTH)) + apart * np.linspace(-1, 1, WIDTH)).astype(np.float32)


def test_the_probe_is_scikit_learns_and_no_threshold_is_better_on_the_held_out_states() -> None:
    sides = [states(40, 0.4, 0), states(55, -0.4, 1), states(30, 0.4, 2), states(20, -0.4, 3)]
    gate = find_gate(*sides)
    fitted = LogisticRegression(max_iter=10_000).fit(np.concatenate(sides[:2]).astype(float), [1] * 40 + [0] * 55)
    assert gate.probe == pytest.approx(fitted.coef_[0] / np.linalg.norm(fitted.coef_[0]), abs=1e-6)
    held, labels = np.concatenate(sides[2:]).astype(float) @ gate.probe, [1] * 30 + [0] * 20
    every = np.linspace(held.min() - 1, held.max() + 1, 5001)
    best = max(balanced_accuracy_score(labels, held > cut) for cut in every)
    assert balanced_accuracy(gate, *sides[2:]) == pytest.approx(balanced_accuracy_score(labels, held > gate.threshold))
    assert 0.75 < balanced_accuracy(gate, *sides[2:]) == pytest.approx(best)
    assert abs(held - gate.threshold).min() > 0  # between states, not on one


def test_states_that_nothing_separates_have_a_gate_that_tells_nothing() -> None:
    gate = find_gate(*(states(200, 0.0, seed) for seed in range(4)))
    assert 0.4 < balanced_accuracy(gate, states(500, 0.0, 5), states(500, 0.0, 6)) < 0.6
    same = np.ones((4, WIDTH), np.float32)
    assert balanced_accuracy(Gate(np.ones(WIDTH), 3.0), same, same) == 0.5


def test_shares_of_tokens_and_of_rows() -> None:
    gate = Gate(np.eye(WIDTH)[0], 0.5)
    rows = [np.zeros((3, WIDTH)), np.eye(WIDTH)[:1], np.concatenate([np.zeros((3, WIDTH)), np.eye(WIDTH)[:1]])]
    assert open_shares(gate, rows) == (pytest.approx(2 / 8), pytest.approx(2 / 3))


@pytest.mark.parametrize("plain", [LobireftEdit(WIDTH, 2, init="paper"), ConsreftEdit(WIDTH, 2, init="paper")])
def test_an_edit_behind_a_gate_is_itself_where_that_is_open(plain: RotatedEdit) -> None:
    gate = Gate(np.eye(WIDTH)[3], -0.2)
    h = torch.randn(40, WIDTH)
    found, is_open = gated_edit(plain.eval(), gate)(h), h[:, 3] > -0.2
    assert torch.equal(found[is_open], plain(h)[is_open]) and torch.equal(found[~is_open], h[~is_open])
    assert 0 < is_open.sum() < 40 and not torch.allclose(plain(h)[~is_open], h[~is_open])


@pytest.mark.parametrize("positions", ["l1", "l1+generated", "all"])
def test_the_states_of_tokens_are_those_whose_mean_is_taken(positions: str) -> None:
    model, rows = CAUSAL["llama"](), rows_of([(3, 9), (5, 7), (2, 14)])
    given = model, rows, find_sites(model), parse_positions(positions), 0
    found = token_states(*given, batch_size=2)  # type: ignore[arg-type]
    with mean_states(*given, batch_size=3) as means:  # type: ignore[arg-type]
        for row, mean in zip(found, np.array(means), strict=True):
            assert row.mean(1) == pytest.approx(mean, rel=1e-4, abs=1e-5)
    assert [row.shape[1] for row in found] == {"l1": [1, 1, 1], "l1+generated": [6, 2, 12], "all": [8, 6, 13]}[
        positions
    ]


def test_rows_without_a_token_to_edit_are_told() -> None:
    model = CAUSAL["llama"]()
    with pytest.raises(ReftuneError, match="positions='generated' edits no token"):
        token_states(model, rows_of([(5, 5)]), find_sites(model), parse_positions("generated"), 0, 1)  # type: ignore[arg-type]


@pytest.mark.parametrize("column", ["prompt", "text"])
def test_labelled_prompts_are_read_with_their_system_messages_and_answers(column: str) -> None:
    rows = [{column: f"p{n}", "label": n % 2 == 0, "system": "Be kind.", "completion": f"a{n}"} for n in range(12)]
    act, rest = read_when(rows)
    assert [row.messages[-1].content for row in act] == [f"p{n}" for n in range(0, 12, 2)]
    assert [row.completion for row in rest] == [f"a{n}" for n in range(1, 12, 2)]
    if column == "prompt":
        assert act[0].messages[0].role == "system"
    assert read_when(rows, "0")[0][0].messages[-1].content == "p1"


@pytest.mark.parametrize(
    ("rows", "acts", "words"),
    [
        ([{"prompt": "a", "label": 1}] * 8, None, "two classes"),
        ([{"prompt": "a", "label": n % 2} for n in range(10)], None, "at least 6"),
        ([{"prompt": "a", "label": "xy"[n % 2]} for n in range(12)], None, "--when-label"),
        ([{"prompt": "a", "label": n % 2} for n in range(12)], "2", "--when-label 2"),
        ([{"prompt": "a", "label": n % 2} for n in range(12)] + [{"prompt": "", "label": 1}], None, "row 13"),
        (
            [{"prompt": "a", "label": n % 2} for n in range(12)] + [{"prompt": "b", "label": None}],
            None,
            "row 13.*label",
        ),
        ([{"prompt": "a"}] * 12, None, "label"),
    ],
)
def test_what_is_no_labelled_prompt(rows, acts: str | None, words: str) -> None:
    with pytest.raises(ReftuneError, match=words):
        read_when(rows, acts)


@pytest.mark.parametrize("count", [6, 7, 20, 101])
@pytest.mark.parametrize("share", [0.01, 0.2, 0.9])
def test_no_row_has_two_parts(count: int, share: float) -> None:
    parts = split(count, share, 0, held=2)
    assert sorted(sum(parts, [])) == list(range(count)) and all(len(part) >= 2 for part in parts)
