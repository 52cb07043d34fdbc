"""Both forms, on a stand-in for vLLM's blocks, against each adapter's own arithmetic row by row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reftune import ReftuneError
from reftune.serving.folded import FoldedAdapter
from reftune.serving.vllm.blocks import decoder_blocks, split
from reftune.serving.vllm.requested import ModelShape, read_checked
from reftune.serving.vllm.slots import DenseSlots, PlannedSlots, Settings, Slots, Step
from tests.serving.vllm.cases import LAYERS, REFT, WIDTH, Cases


class Block(nn.Module):
    def forward(self, hidden: Tensor, residual: Tensor | None) -> Any:
        return hidden.clone() if residual is None else (hidden.clone(), residual)


def make(form: str, **settings: Any) -> tuple[Slots, dict[int, nn.Module]]:
    blocks: dict[int, nn.Module] = {layer: Block() for layer in range(LAYERS)}
    if form == "planned":
        return PlannedSlots(blocks), blocks
    return DenseSlots(blocks, Settings(**settings), len(REFT), WIDTH, 256, torch.device("cpu")), blocks


def by_hand(adapters: dict[int, FoldedAdapter], step: Step, hidden: Tensor, layer: int) -> Tensor:
    """What the hidden state becomes, token by token, by `Positions.ordinals`."""
    out, row = hidden.clone(), 0
    for number, computed, scheduled, prompt in zip(*step, strict=True):
        for ordinal in range(computed, computed + scheduled):
            adapter = adapters.get(number)
            if adapter is not None and ordinal in adapter.positions.ordinals(prompt, max(prompt, ordinal + 1)):
                prefix = int(adapter.positions.counts(torch.tensor(prompt))[0])
                half = "both" if not adapter.untied else "prefix" if ordinal < prefix else "suffix"
                for edit in adapter.edits:
                    if edit.layer == layer and edit.part == half and edit.folded is not None:
                        out[row] = edit.folded(hidden[row])
            row += 1
    return out


STEPS = [
    Step([0, 1, 2, 3, 4], [0, 0, 0, 0, 0], [3, 9, 20, 8, 1], [3, 9, 20, 8, 1]),
    Step([5, 6, 0, 7, 8, 3], [4, 30, 9, 0, 6, 8], [3, 1, 1, 16, 1, 1], [20, 12, 4, 40, 7, 8]),
    Step([3, 4, 5, 6, 7, 8], [2] * 6, [5] * 6, [5] * 6),
    Step([6, 8], [20, 20], [1, 1], [4, 4]),
    Step([1, 2], [20, 20], [1, 1], [4, 4]),
    Step([], [], [], []),
]


@pytest.mark.parametrize("form", ["planned", "dense"])
@pytest.mark.parametrize("pair", [False, True])
def test_every_row_of_a_step_is_edited_by_its_own_adapter(form: str, pair: bool, written: Cases) -> None:
    shape = ModelShape(LAYERS, WIDTH)
    adapters = {n: read_checked(written.adapter(name), shape) for n, name in enumerate(REFT, start=1)}
    slots, blocks = make(form)
    for slot, (number, adapter) in enumerate(reversed(adapters.items())):
        slots.put(number, slot, adapter)
    for step in STEPS:
        slots.plan(step)
        rows = sum(step.scheduled)
        hidden, residual = torch.randn(rows, WIDTH), torch.randn(rows, WIDTH) if pair else None
        for layer, block in blocks.items():
            out = split(block(hidden, residual))
            state = out[0] if residual is None else out[0] + residual
            before = hidden if residual is None else hidden + residual
            torch.testing.assert_close(state, by_hand(adapters, step, before, layer), atol=1e-4, rtol=1e-4)
            untouched = (by_hand(adapters, step, before, layer) == before).all(-1)
            assert out[0][untouched].equal(hidden[untouched])


@pytest.mark.parametrize("form", ["planned", "dense"])
def test_a_slot_that_changes_hands_keeps_nothing(form: str, written: Cases) -> None:
    shape = ModelShape(LAYERS, WIDTH)
    everywhere, first = (read_checked(written.adapter(name), shape) for name in ("l1_everywhere", "l1"))
    slots, blocks = make(form)
    slots.put(1, 0, everywhere)
    slots.drop(1)
    slots.put(2, 0, first)
    step = Step([2, 1], [0, 0], [2, 2], [2, 2])
    slots.plan(step)
    hidden = torch.randn(4, WIDTH)
    for layer, block in blocks.items():
        torch.testing.assert_close(block(hidden, None), by_hand({2: first}, step, hidden, layer), atol=1e-4, rtol=1e-4)
    slots.plan(None)
    assert all(block(hidden, None).equal(hidden) for block in blocks.values())


@pytest.mark.parametrize("form", ["planned", "dense"])
def test_adapters_enter_slots_in_and_out_of_inference_mode(form: str, written: Cases) -> None:
    shape = ModelShape(LAYERS, WIDTH)
    slots, blocks = make(form)
    adapters: dict[int, FoldedAdapter] = {}
    for slot, name in enumerate(REFT):
        with torch.inference_mode(slot % 2 == 0):
            adapters[slot + 1] = read_checked(written.adapter(name), shape)
            slots.put(slot + 1, slot, adapters[slot + 1])
    slots.drop(1)
    step = Step([0, 2, 3, 4, 5], [0, 0, 0, 0, 0], [3, 9, 20, 8, 1], [3, 9, 20, 8, 1])
    slots.plan(step)
    hidden = torch.randn(sum(step.scheduled), WIDTH)
    for layer, block in blocks.items():
        torch.testing.assert_close(block(hidden, None), by_hand(adapters, step, hidden, layer), atol=1e-4, rtol=1e-4)


def test_the_dense_form_says_what_it_has_no_room_for(written: Cases) -> None:
    shape = ModelShape(LAYERS, WIDTH)
    for name, settings, said in (
        ("all_orthogonal", {"rank": 4}, '"rank": 8'),
        ("f2l3_untied", {"layers": [2]}, '"layers": \\[0, 2\\]'),
        ("f2l3_untied", {"untied": False}, '"untied": true'),
    ):
        slots, _ = make("dense", **settings)
        assert isinstance(slots, DenseSlots)
        with pytest.raises(ReftuneError, match=said):
            slots.check(read_checked(written.adapter(name), shape))


@pytest.mark.parametrize("given", [{"forms": "dense"}, {"form": "fast"}])
def test_settings_that_do_not_exist_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ReftuneError, match="additional_config: reftune.form"):
        Settings.of({"reftune": given})


def test_blocks_are_found_by_structure_or_the_model_is_refused() -> None:
    class Attention(nn.Module):
        pass

    class PPMissingLayer(nn.Module):
        pass

    def stack(count: int) -> nn.ModuleList:
        return nn.ModuleList(
            nn.ModuleDict({"attention": Attention(), "experts": nn.ModuleList()}) for _ in range(count)
        )

    model = nn.ModuleDict({"vision": nn.ModuleList([nn.Linear(2, 2)]), "layers": stack(3)})
    model["layers"][1] = PPMissingLayer()
    found = decoder_blocks(model, 3, lambda module: isinstance(module, Attention))
    assert {number: block is model["layers"][number] for number, block in found.items()} == {0: True, 2: True}
    for wrong in (nn.ModuleDict({"a": stack(3), "b": stack(3)}), nn.ModuleDict({"a": stack(2)}), nn.Linear(2, 2)):
        with pytest.raises(ReftuneError, match="list of 3 decoder blocks"):
            decoder_blocks(wrong, 3, lambda module: isinstance(module, Attention))
    with pytest.raises(ReftuneError, match="cannot be edited"):
        split((torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(1, 2)))
