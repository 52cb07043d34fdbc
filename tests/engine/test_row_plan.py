"""The rows of a flat batch against the positions' own reading, however an engine cuts and orders the work."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reftune.engine.position_grammar import Positions, parse_positions
from reftune.engine.positions import TokenLayout
from reftune.engine.row_plan import ENDLESS, EditedRange, Run, Tokens, edited_ranges, edited_runs, edits_inside
from reftune.engine.row_plan import row_slots as slots_of_rows

ENDS = st.sampled_from(["", "f1", "f3", "f7", "l1", "l2", "l9", "f2+l3", "f7+l7", "f1+l9", "prompt"])
POSITIONS = st.builds(
    lambda end, generated: parse_positions("+".join(filter(None, [end, generated])) or "all"),
    ENDS,
    st.sampled_from(["", "generated"]),
)
LENGTHS = st.integers(0, 20)
REQUESTS = st.tuples(POSITIONS, LENGTHS, LENGTHS, st.booleans())


def part_of(positions: Positions, prompt: int, ordinal: int) -> str:
    """The half of an untied pair that edits a token, from the layout that the engine reads positions with."""
    layout = TokenLayout(torch.tensor([[True]]), torch.tensor([[ordinal]]), torch.tensor([[prompt]]))
    return "prefix" if layout.selected(positions, "prefix").item() else "suffix"


def edited_by(positions: Positions, prompt: int, total: int, untied: bool) -> dict[int, str]:
    found = positions.ordinals(prompt, total)
    return {o: part_of(positions, prompt, o) if untied and not positions.everywhere else "both" for o in found}


@given(POSITIONS, LENGTHS, LENGTHS)
def test_ranges_are_the_ordinals_of_the_positions(positions: Positions, prompt: int, answer: int) -> None:
    ranges = edited_ranges(positions, prompt)
    assert {o for o in range(prompt + answer) if any(a <= o < b for a, b, _ in ranges)} == positions.ordinals(
        prompt, prompt + answer
    )
    assert all(a.stop < b.start for a, b in zip(ranges, ranges[1:], strict=False))


@given(POSITIONS.filter(lambda positions: positions.has_two_ends), LENGTHS, LENGTHS)
def test_the_halves_of_an_untied_pair_are_those_of_the_layout(positions: Positions, prompt: int, answer: int) -> None:
    found = {o: part for a, b, part in edited_ranges(positions, prompt, True) for o in range(a, min(b, 99))}
    expected = edited_by(positions, prompt, prompt + answer, untied=True)
    assert {o: part for o, part in found.items() if o < prompt + answer} == expected


@settings(suppress_health_check=[HealthCheck.too_slow])  # a busy machine draws slowly
@given(st.lists(REQUESTS, max_size=6), st.data())
def test_chunks_preemption_and_padding_edit_what_a_whole_forward_edits(requests, data: st.DataObject) -> None:
    """Requests advance by chunks of any size in any order, are thrown back to their start, and are padded between."""
    untied = [positions.has_two_ends and pair for positions, _, _, pair in requests]
    ranges = [edited_ranges(p, n, u) for (p, n, _, _), u in zip(requests, untied, strict=True)]
    totals = [n + m for _, n, m, _ in requests]
    seen: list[dict[int, str]] = [{} for _ in requests]
    computed = [0] * len(requests)
    thrown_back = 0
    while any(done < total for done, total in zip(computed, totals, strict=True)):
        order = data.draw(st.permutations(range(len(requests))))
        batch, owner = [], []
        for i in order:
            if computed[i] and thrown_back < 3 and data.draw(st.integers(0, 9)) == 0:
                computed[i], seen[i], thrown_back = 0, {}, thrown_back + 1
            count = data.draw(st.integers(0, totals[i] - computed[i]))
            pad = data.draw(st.integers(0, 2))
            batch += [Tokens(i, ranges[i], computed[i], count), Tokens(None, (), 0, pad)]
            owner += [(i, computed[i] + k) for k in range(count)] + [None] * pad
            computed[i] += count
        for start, stop, adapter, part in edited_runs(batch):
            for row in range(start, stop):
                place = owner[row]
                assert place is not None and place[0] == adapter
                assert place[1] not in seen[adapter]
                seen[adapter][place[1]] = part
    for (positions, prompt, _, _), total, pair, found in zip(requests, totals, untied, seen, strict=True):
        assert found == edited_by(positions, prompt, total, pair)


@given(POSITIONS, st.lists(st.integers(1, 9), min_size=1, max_size=3), st.integers(1, 3), st.integers(0, 4))
def test_rows_of_a_padded_batch_of_beams_are_those_of_its_layout(
    positions: Positions, prompts: list[int], beams: int, answer: int
) -> None:
    """A left-padded batch is a flat batch too: padding, then the row's tokens; every beam is a row of its own."""
    width = max(prompts) + answer
    rows = [prompt for prompt in prompts for _ in range(beams)]
    batch: list[Tokens] = []
    for prompt in rows:
        batch.append(Tokens(None, (), 0, width - prompt - answer))
        batch.append(Tokens(1, edited_ranges(positions, prompt), 0, prompt + answer))
    attended = torch.tensor([[column >= width - prompt - answer for column in range(width)] for prompt in rows])
    layout = TokenLayout(attended, attended.cumsum(-1) - 1, torch.tensor(rows).unsqueeze(-1))
    found = slots_of_rows(edited_runs(batch), len(rows) * width, lambda run: run.adapter)
    assert found == layout.selected(positions).flatten().int().tolist()


def test_a_step_that_edits_nothing_has_no_runs() -> None:
    ranges = edited_ranges(parse_positions("l1"), 40)
    assert edited_runs([Tokens(1, ranges, 0, 39), Tokens(2, ranges, 40, 1), Tokens(0, (), 0, 7)]) == []


def test_rows_are_counted_over_the_requests_before() -> None:
    ranges = edited_ranges(parse_positions("f2+l2"), 9, True)
    batch = [Tokens("base", (), 3, 4), Tokens("a", ranges, 1, 7)]
    assert edited_runs(batch) == [Run(4, 5, "a", "prefix"), Run(10, 11, "a", "suffix")]


def test_what_a_block_key_names_is_counted_from_the_blocks_start() -> None:
    ranges = edited_ranges(parse_positions("f2+l2+generated"), 20, True)
    assert ranges == (EditedRange(0, 2, "prefix"), EditedRange(18, ENDLESS, "suffix"))
    assert [edits_inside(ranges, start, start + 8) for start in (0, 8, 16, 24)] == [
        (EditedRange(0, 2, "prefix"),),
        (),
        (EditedRange(2, 8, "suffix"),),
        (EditedRange(0, 8, "suffix"),),
    ]
