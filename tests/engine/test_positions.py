"""The grammar of positions and its reading of padding, caches, packing and labels."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reftune import ReftuneError, parse_positions
from reftune.engine.position_plan import EVERY_ROW, PositionPlan
from reftune.engine.positions import read_layout
from reftune.engine.prompt_memory import PromptMemory

ENDS = st.one_of(
    st.integers(1, 9).map(lambda n: f"f{n}"),
    st.integers(1, 9).map(lambda n: f"l{n}"),
    st.tuples(st.integers(1, 9), st.integers(1, 9)).map(lambda ab: f"f{ab[0]}+l{ab[1]}"),
)
SPECS = st.one_of(ENDS, ENDS.map(lambda ends: f"{ends}+generated"), st.sampled_from(["prompt", "generated", "all"]))
CPU = torch.device("cpu")


def edited_rows(spec: str, part: str = "both", **arguments) -> list[list[int]]:
    """Columns edited in each row."""
    layout = read_layout(device=CPU, **arguments)
    return [row.nonzero().squeeze(-1).tolist() for row in layout.selected(parse_positions(spec), part)]


@pytest.mark.parametrize(
    "text",
    [
        "f7+l7",
        "l1",
        "f3",
        "prompt",
        "all",
        " F2 + L3 ",
        "ALL",
        "generated",
        "l1 + Generated",
        "f2+generated",
        "f2+l3+generated",
    ],
)
def test_a_position_string_parses_to_its_normal_form(text: str):
    assert parse_positions(text).text == text.lower().replace(" ", "")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "+",
        "f0",
        "l00",
        "l",
        "f3l2",
        "f3+",
        "+l2",
        "x",
        "l2+f1",
        "f1+f2",
        "f-1",
        "7",
        "+generated",
        "l1generated",
        "generated+l1",
        "generated+generated",
        "prompt+l1",
        "prompt+f1",
        "all+generated",
        "l1+all",
    ],
)
def test_a_string_that_is_no_position_is_refused_with_the_grammar(text: str):
    with pytest.raises(ReftuneError, match="fN .*lN .*fA\\+lB"):
        parse_positions(text)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 30))
def test_short_prompts_share_their_tokens_between_prefix_and_suffix(a: int, b: int, n: int):
    positions = parse_positions(f"f{a}+l{b}")
    prefix, suffix = (int(count) for count in positions.counts(torch.tensor(n)))
    assert prefix == min(a, n // 2) and suffix == min(b, n - prefix)
    assert len(positions.ordinals(n)) == prefix + suffix, "no token twice"


@given(SPECS, st.lists(st.integers(1, 12), min_size=1, max_size=4), st.integers(0, 5), st.data())
def test_padding_side_and_batch_do_not_change_what_is_edited(spec: str, prompts: list[int], response: int, data):
    lengths = [n + response for n in prompts]
    width = max(lengths)
    sides = data.draw(st.lists(st.sampled_from(["left", "right"]), min_size=len(prompts), max_size=len(prompts)))
    mask = torch.zeros(len(prompts), width, dtype=torch.long)
    starts = [width - n if side == "left" else 0 for n, side in zip(lengths, sides, strict=True)]
    labels = torch.full_like(mask, -100)
    for row, (start, n, length) in enumerate(zip(starts, prompts, lengths, strict=True)):
        mask[row, start : start + length] = 1
        labels[row, start + n : start + length] = 5
    size = {"batch": len(prompts), "sequence": width}
    expected = [
        sorted(start + o for o in parse_positions(spec).ordinals(n, n + response))
        for start, n in zip(starts, prompts, strict=True)
    ]
    assert edited_rows(spec, **size, attention_mask=mask, labels=labels) == expected
    assert edited_rows(spec, **size, attention_mask=mask, prompt_lengths=torch.tensor(prompts)) == expected
    if spec != "all" and "generated" not in spec:
        for columns, start, n in zip(expected, starts, prompts, strict=True):
            assert all(start <= column < start + n for column in columns), "a response token was edited"


@given(SPECS, st.lists(st.tuples(st.integers(1, 8), st.integers(0, 4)), min_size=2, max_size=4))
def test_every_document_of_a_packed_row_has_its_own_prompt(spec: str, documents: list[tuple[int, int]]):
    total = sum(n + m for n, m in documents)
    position_ids = torch.cat([torch.arange(n + m) for n, m in documents]).unsqueeze(0)
    labels = torch.cat([torch.tensor([-100] * n + [5] * m) for n, m in documents]).unsqueeze(0)
    starts = torch.tensor([0, *(sum(n + m for n, m in documents[: i + 1]) for i in range(len(documents)))])
    expected: list[int] = []
    for start, (n, m) in zip(starts.tolist(), documents, strict=False):
        expected += sorted(start + o for o in parse_positions(spec).ordinals(n, n + m))
    size = {"batch": 1, "sequence": total}
    assert edited_rows(spec, **size, position_ids=position_ids, labels=labels) == [expected]
    assert edited_rows(spec, **size, document_starts=starts, labels=labels) == [expected]
    prompts = torch.tensor([n for n, _ in documents])
    assert edited_rows(spec, **size, document_starts=starts, prompt_lengths=prompts) == [expected]


@given(SPECS, st.lists(st.integers(1, 9), min_size=1, max_size=3), st.integers(1, 4), st.integers(1, 3), st.data())
def test_chunks_beams_and_candidates_inside_generate_edit_the_same_tokens(
    spec: str, prompts: list[int], generated: int, beams: int, data
):
    width = max(prompts)
    mask = torch.zeros(len(prompts), width, dtype=torch.bool)
    for row, n in enumerate(prompts):
        mask[row, width - n :] = True
    memory, total = PromptMemory(mask), width + generated
    cuts = sorted(data.draw(st.sets(st.integers(1, total - 1), max_size=3))) if total > 1 else []
    edited: set[tuple[int, int]] = set()
    for start, stop in zip([0, *cuts], [*cuts, total], strict=True):
        hidden = torch.zeros(len(prompts) * beams, stop - start, 2)
        active = {"default": parse_positions(spec)}
        plan = memory.plan(len(hidden), stop - start, start, active, CPU)
        rows = None if plan is None else plan.rows(active["default"], "both", hidden)
        flat = range(len(hidden) * (stop - start)) if rows == EVERY_ROW else [] if rows is None else rows.tolist()
        edited |= {(i // (stop - start), start + i % (stop - start)) for i in flat}
    expected = {
        (row * beams + beam, width - n + o)
        for row, n in enumerate(prompts)
        for beam in range(beams)
        for o in parse_positions(spec).ordinals(n, n + generated)
    }
    assert edited == expected


def test_an_untied_pair_splits_the_tokens_between_its_two_edits():
    size = {"batch": 1, "sequence": 7, "prompt_lengths": torch.tensor([5])}
    assert edited_rows("f3+l3", "prefix", **size) == [[0, 1]]
    assert edited_rows("f3+l3", "suffix", **size) == [[2, 3, 4]]
    assert edited_rows("f3+l3+generated", "prefix", **size) == [[0, 1]]
    assert edited_rows("f3+l3+generated", "suffix", **size) == [[2, 3, 4, 5, 6]]


def test_generated_tokens_belong_to_the_suffix_edit_of_an_untied_pair_in_decode_steps_too():
    positions, hidden = parse_positions("f1+l1+generated"), torch.zeros(2, 1, 3)
    plan = PromptMemory(torch.ones(2, 4, dtype=torch.bool)).plan(2, 1, 4, {"default": positions}, CPU)
    assert plan.rows(positions, "prefix", hidden) is None
    assert plan.rows(positions, "suffix", hidden) == EVERY_ROW


def test_the_prompt_and_what_follows_it_are_all():
    assert parse_positions("prompt + generated") == parse_positions("all")


@given(st.integers(1, 9), st.integers(1, 9))
def test_l1_and_generated_are_the_tokens_that_predict_the_completion(prompt: int, response: int):
    predicting = parse_positions("l1+generated").ordinals(prompt, prompt + response)
    assert predicting == {label - 1 for label in range(prompt, prompt + response)} | {prompt + response - 1}


def test_a_row_without_labels_counts_as_all_prompt():
    labels = torch.tensor([[-100, -100, 5], [-100, -100, -100]])
    assert edited_rows("l1", batch=2, sequence=3, labels=labels) == [[1], [2]]


def test_a_decoder_that_predicts_label_i_from_input_i_has_its_start_token_as_prompt():
    labels = torch.tensor([[5, 6, 7], [-100, 6, 7]])
    assert edited_rows("prompt", batch=2, sequence=3, labels=labels, label_offset=1) == [[0], [0, 1]]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"attention_mask": torch.ones(2, 1, 3, 3)}, "2-D mask"),
        ({"attention_mask": torch.ones(3, 3)}, "shape \\(3, 3\\), expected \\(2, 3\\)"),
        ({"prompt_lengths": torch.tensor([1])}, "one integer for each of the 2 rows"),
        ({"prompt_lengths": torch.tensor([1.0, 2.0])}, "one integer"),
        ({"past_length": 4}, "prompt_lengths"),
        ({"labels": torch.ones(2, 3).long(), "must_know_prompt": "x"}, "empty prompt"),
        ({"must_know_prompt": "neither labels nor prompt_lengths"}, "neither labels"),
        ({"labels": torch.ones(2)}, "labels have shape"),
    ],
)
def test_what_cannot_be_read_is_refused(arguments: dict, words: str):
    with pytest.raises(ReftuneError, match=words):
        read_layout(batch=2, sequence=3, device=CPU, **arguments)


def test_all_positions_need_no_prompt_end():
    assert edited_rows("all", batch=2, sequence=3, past_length=4, needs_prompt=False) == [[0, 1, 2]] * 2


def test_a_mixed_batch_edits_each_row_by_its_own_adapter():
    layout = read_layout(batch=2, sequence=3, device=CPU)
    plan = PositionPlan(layout, row_adapters=["a", "b"])
    hidden = torch.zeros(4, 3, 2)  # two beams a row would need a layout of four rows
    plan = PositionPlan(read_layout(batch=4, sequence=3, device=CPU), row_adapters=["a", "b"])
    assert plan.rows(parse_positions("l1"), "both", hidden, "a").tolist() == [2, 5]
    assert plan.rows(parse_positions("l1"), "both", hidden, "b").tolist() == [8, 11]
    assert plan.rows(parse_positions("l1"), "both", hidden, "c") is None


def test_rows_are_refused_for_a_tensor_that_does_not_hold_the_tokens():
    plan = PositionPlan(read_layout(batch=2, sequence=3, device=CPU))
    with pytest.raises(ReftuneError, match="changes the sequence"):
        plan.rows(parse_positions("l1"), "both", torch.zeros(2, 4, 8))
