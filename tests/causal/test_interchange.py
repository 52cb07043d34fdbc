from typing import Any

import pytest
import torch

from reftune.causal.actions import Subspace
from reftune.causal.interchange import (
    Intervention,
    Run,
    Source,
    add,
    collect,
    fill,
    intervene,
    mean,
    noise,
    put,
    read,
    run,
    swap,
    zero,
)
from reftune.causal.locations import Location
from reftune.errors import ReftuneError
from tests.causal.networks import Gru, Mlp
from tests.tiny_models import ENCODER_DECODERS, TINY, VISION_LANGUAGE, tiny_inputs


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def rows(name: str, batch: int = 2, seed: int = 1, length: int = 7):
    inputs = tiny_inputs(name, batch, length)
    torch.manual_seed(seed)
    key = "decoder_input_ids" if "decoder_input_ids" in inputs else "input_ids"
    if key in inputs:
        fresh = torch.randint(3, 96, inputs[key].shape)
        inputs[key] = torch.where(inputs[key] == 96, inputs[key], fresh)
    return inputs


def component(name: str) -> str:
    return {"llava": "language.block_output"}.get(
        name, "decoder.block_output" if name in ENCODER_DECODERS else "block_output"
    )


@pytest.mark.parametrize("name", [name for name in TINY if name != "vit"])
def test_swapping_all_positions_gives_the_source_and_leaving_gives_the_base(name):
    model = TINY[name]().eval()
    base, source = rows(name, seed=1), rows(name, seed=2)
    if name in ENCODER_DECODERS:  # the decoder also reads the encoder: the same one on both sides
        source["input_ids"] = base["input_ids"]
    at = Location(component(name), 1)
    before = model(**base).logits
    swapped = run(model, Run(base, (swap(at, source),))).logits
    torch.testing.assert_close(swapped, model(**source).logits)
    assert not torch.allclose(swapped, before)
    one = run(model, Run(base, (swap(at.at(-1), source),))).logits
    assert not torch.allclose(one, before) and not torch.allclose(one, swapped)
    assert torch.equal(model(**base).logits, before)


def test_nothing_stays_on_the_model_even_after_an_error():
    model = TINY["llama"]().eval()
    base = rows("llama")
    for position in (-1, 40):
        try:
            run(model, Run(base, (swap(Location("block_output", 1, position), rows("llama", seed=2)),)))
        except ReftuneError:
            assert position == 40
        assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
        assert "generate" not in model.__dict__


def test_a_swap_of_itself_changes_nothing():
    model, base = TINY["gpt2"]().eval(), rows("gpt2")
    places = [Location("head_output[1]", 2, [0, 3]), Location("mlp_output", 0, -2), Location("query_output", 1, 4)]
    swapped = run(model, Run(base, tuple(swap(place, base) for place in places))).logits
    torch.testing.assert_close(swapped, model(**base).logits)


def test_each_row_has_its_own_positions_in_base_and_source():
    model, base, source = TINY["llama"]().eval(), rows("llama"), rows("llama", seed=2)
    there, here = torch.tensor([1, 5]), torch.tensor([6, 2])
    found = run(model, Run(base, (swap(Location("block_input", 2, here), source, Location("block_input", 2, there)),)))
    states = read(model, source, Location("block_input", 2))[0]
    with intervene(
        model, collect(Location("block_input", 2)), put(Location("block_input", 2, here), states[[0, 1], there])
    ) as it:
        again = model(**base)
        assert it.collected().shape == (2, 7, 32)
    assert torch.equal(found.logits, again.logits)
    alone = [
        run(
            model,
            Run(
                {k: v[i : i + 1] for k, v in base.items()},
                (
                    swap(
                        Location("block_input", 2, int(here[i])),
                        {k: v[i : i + 1] for k, v in source.items()},
                        Location("block_input", 2, int(there[i])),
                    ),
                ),
            ),
        ).logits
        for i in range(2)
    ]
    torch.testing.assert_close(found.logits, torch.cat(alone))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_moves_no_position(side):
    model = TINY["llama"]().eval()
    short, source = rows("llama", 1, 3, 4)["input_ids"], rows("llama", 2, 4)
    long = rows("llama", 1, 5)["input_ids"]
    pad = torch.zeros(1, 3, dtype=torch.long)
    padded = torch.cat([pad, short] if side == "left" else [short, pad], 1)
    base = {"input_ids": torch.cat([padded, long]), "attention_mask": torch.cat([padded, long]).ne(0).long()}
    for positions in (-1, 1, "l2", [0, -1]):
        at = Location("block_output", 1, positions)
        there = Location("block_output", 0, [2, 3] if positions in ("l2", [0, -1]) else 3)
        together = run(model, Run(base, (swap(at, source, there),))).logits[0][base["attention_mask"][0].bool()]
        first = {k: v[:1] for k, v in source.items()}
        alone = run(model, Run({"input_ids": short}, (swap(at, first, there),))).logits[0]
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("position", [-1, 4, "l1", "prompt", "all"])
@pytest.mark.parametrize("first_supervised", [0, 3, 7])
def test_labels_move_no_position(position, first_supervised):
    model, inputs, other = TINY["llama"](), tiny_inputs("llama"), tiny_inputs("llama")
    other["input_ids"] = other["input_ids"].flip(1)
    labels = inputs["input_ids"].masked_fill(torch.arange(7) < first_supervised, -100)
    at = Location("block_output", 1, position)
    with torch.no_grad():
        base = model(**inputs).logits
        with intervene(model, swap(at, other)):
            plain = model(**inputs).logits
            assert torch.equal(model(**inputs, labels=labels).logits, plain)
        states = [read(model, {**inputs, **more}, at)[0] for more in ({}, {"labels": labels})]
    assert not torch.allclose(base, plain)
    assert torch.equal(*states)


def test_a_direct_forward_under_an_intervention_is_the_models_call():
    model, rows = TINY["bert"](), tiny_inputs("bert")
    rows["attention_mask"][0, 4:] = 0
    at = Location("block_output", 1, -1)
    with torch.no_grad():
        plain = model(**rows).logits
        with intervene(model, zero(at)):
            with intervene(model, zero(at)):
                edited = model(**rows).logits
                assert torch.equal(model.forward(**rows).logits, edited)
            assert torch.equal(model.forward(**rows).logits, edited)
        assert not torch.allclose(edited, plain)
        assert torch.equal(model.forward(**rows).logits, plain)
    assert "forward" not in model.__dict__


def test_a_subspace_swap_keeps_the_rest_and_complements_add_up():
    model, base, source = TINY["qwen2"]().eval(), rows("qwen2"), rows("qwen2", seed=2)
    at = Location("block_output", 1, 3)
    rotation = torch.linalg.qr(torch.randn(32, 32)).Q
    one, rest = Subspace(rotation[:5]), Subspace(rotation[5:])
    with intervene(model, swap(at, source, subspace=one), collect(at)) as it:
        model(**base)
        found, after = it.collected(0)[:, 0], it.collected(1)[:, 0]
    there = read(model, source, at)[0][:, 0]
    torch.testing.assert_close(after @ rotation[:5].T, there @ rotation[:5].T)
    torch.testing.assert_close(after @ rotation[5:].T, found @ rotation[5:].T)
    both = run(model, Run(base, (swap(at, source, subspace=one), swap(at, source, subspace=rest)))).logits
    torch.testing.assert_close(both, run(model, Run(base, (swap(at, source),))).logits)


def test_several_sources_at_several_sites_at_once():
    model, base = TINY["gpt2"]().eval(), rows("gpt2")
    first, second = rows("gpt2", seed=2), rows("gpt2", seed=3)
    a, b = Location("block_output", 0, 1), Location("head_output[0,2]", 1, 4)
    together = run(model, Run(base, (swap(a, first), swap(b, second)))).logits
    states = [read(model, first, a)[0], read(model, second, b)[0]]
    one_by_one = run(model, Run(base, (put(a, states[0]), put(b, states[1])))).logits
    assert torch.equal(together, one_by_one)


def test_a_nested_interchange_reads_a_run_that_is_itself_intervened_on():
    model, base = TINY["gpt2"]().eval(), rows("gpt2")
    first, second = rows("gpt2", seed=2), rows("gpt2", seed=3)
    low, high = Location("block_output", 0, 2), Location("block_output", 1, 5)
    nested = run(model, Run(base, (swap(high, Run(first, (swap(low, second),))),))).logits
    with intervene(model, swap(low, second), collect(high)) as it:
        model(**first)
        middle = it.collected(1)
    assert torch.equal(nested, run(model, Run(base, (put(high, middle),))).logits)
    assert not torch.allclose(nested, run(model, Run(base, (swap(high, first),))).logits)


def test_one_source_runs_once_and_only_as_far_as_needed():
    model, base, source = TINY["llama"]().eval(), rows("llama"), rows("llama", seed=2)
    calls = [0, 0, 0]

    def count(index):
        def hook(*_):
            calls[index] += 1

        return hook

    for index, block in enumerate(model.model.layers):
        block.register_forward_hook(count(index))
    run(model, Run(base, (swap(Location("block_output", 0, 1), source), swap(Location("block_output", 1, 2), source))))
    assert calls == [2, 2, 1]


def test_zero_mean_noise_addition_and_constants():
    model, base, source = TINY["llama"]().eval(), rows("llama"), rows("llama", 5, 2)
    at = Location("mlp_output", 1, [1, 2])
    vector = torch.randn(32)

    def after(*what):
        with intervene(model, *what, collect(at)) as it:
            model(**base)
            return it.collected(0), it.collected(len(what))

    before, zeroed = after(zero(at))
    assert not zeroed.any() and before.any()
    assert torch.equal(after(fill(at, vector))[1], vector.expand(2, 2, 32))
    torch.testing.assert_close(after(mean(at, source))[1], read(model, source, at)[0].mean(0).expand(2, 2, 32))
    torch.testing.assert_close(after(add(at, vector, 2.0))[1], before + 2 * vector)
    noisy = after(noise(at, 0.5, seed=1))[1] - before
    assert 0.3 < float(noisy.std()) < 0.7
    assert torch.equal(noisy, after(noise(at, 0.5, seed=1))[1] - before)


def test_a_head_is_changed_alone():
    model, base, source = TINY["llama"]().eval(), rows("llama"), rows("llama", seed=2)
    at = Location("head_output[1]", 1, 3)
    whole = Location("model.layers.{layer}.self_attn.o_proj:input", 1, 3)
    with intervene(model, swap(at, source), collect(whole)) as it:
        model(**base)
        found = it.collected(1)[:, 0].unflatten(-1, (4, 8))
    there, here = (read(model, x, whole)[0][:, 0].unflatten(-1, (4, 8)) for x in (source, base))
    assert torch.equal(found[:, 1], there[:, 1])
    assert torch.equal(found[:, [0, 2, 3]], here[:, [0, 2, 3]])


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_is_edited_at_the_prompt_alone(cache, beams):
    model: Any = TINY["llama"]().eval()
    base, source = rows("llama"), rows("llama", seed=2)
    options = {"max_new_tokens": 4, "do_sample": False, "use_cache": cache, "num_beams": beams, "pad_token_id": 0}
    plain = model.generate(**base, **options)
    at = Location("block_output", 1, -1)
    with intervene(model, swap(at, source)):
        edited = model.generate(**base, **options)
    assert not torch.equal(plain, edited)
    if beams == 1:
        ids = base["input_ids"]
        states = read(model, source, at)[0]
        for _ in range(4):
            with intervene(model, put(at.at(6), states)):
                ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
        assert torch.equal(ids, edited)
    assert torch.equal(plain, model.generate(**base, **options))


def test_addition_at_all_positions_reaches_generated_tokens_too():
    model: Any = TINY["llama"]().eval()
    base = rows("llama")
    vector = 5 * torch.randn(32)
    ids = base["input_ids"]
    with intervene(model, add(Location("block_output", 1, "all"), vector)):
        found = model.generate(**base, max_new_tokens=3, do_sample=False, pad_token_id=0)
        for _ in range(3):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(found, ids)


def test_any_module_by_its_path():
    model, base, source = Mlp(), torch.randn(4, 8), torch.randn(4, 8)
    at = Location("blocks.{layer}", 1)
    torch.testing.assert_close(run(model, Run(base, (swap(at, source),))), model(source))
    assert read(model, source, at)[0].shape == (4, 1, 16)
    half = run(model, Run(base, (swap(at, source, subspace=Subspace.of_neurons([0, 1, 2], 16)),)))
    by_hand = model.blocks[1](model.blocks[0](base))
    by_hand[:, :3] = model.blocks[1](model.blocks[0](source))[:, :3]
    torch.testing.assert_close(half, model.head(model.blocks[2](by_hand)))


def test_a_recurrent_cell_is_changed_at_a_time_step():
    model, base, source = Gru(), torch.randn(2, 5, 4), torch.randn(2, 5, 4)
    at = Location("cell", positions=2)
    found = run(model, Run(base, (swap(at, source),)))
    torch.testing.assert_close(found, model(torch.cat([source[:, :3], base[:, 3:]], 1)))
    rows_apart = run(model, Run(base, (swap(Location("cell", positions=torch.tensor([1, 3])), source),)))
    torch.testing.assert_close(rows_apart[0], model(torch.cat([source[:1, :2], base[:1, 2:]], 1))[0])
    torch.testing.assert_close(rows_apart[1], model(torch.cat([source[1:, :4], base[1:, 4:]], 1))[0])
    every = read(model, source, Location("cell"))[0]
    assert torch.equal(every[:, 2], read(model, source, at)[0][:, 0])


def test_gradients_pass_through_an_intervention():
    model, base, source = Mlp(), torch.randn(4, 8), torch.randn(4, 8)
    scale = torch.ones(16, requires_grad=True)
    at = Location("blocks.{layer}", 1)
    with torch.enable_grad(), intervene(model, add(at, scale)):
        model(base).sum().backward()
    assert scale.grad is not None and scale.grad.any()
    assert read(model, source, at)[0].grad_fn is None


def test_a_callable_of_ones_own_is_an_action():
    model, base, source = Mlp(), torch.randn(4, 8), torch.randn(4, 8)
    at = Location("blocks.{layer}", 0)
    mixed = Intervention(at, lambda h, s: (h + s) / 2, (Source(Run(source)),))
    expected = (read(model, base, at)[0] + read(model, source, at)[0]) / 2
    with intervene(model, mixed, collect(at)) as it:
        model(base)
        torch.testing.assert_close(it.collected(1), expected)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (lambda s: swap(Location("block_outptu", 1, -1), s), "block_outptu.*did you mean 'block_output'"),
        (lambda s: swap(Location("block_output", 9, -1), s), r"\[9\]: this model has 3 layers"),
        (lambda s: swap(Location("block_output", None, -1), s), "in 3 layers: give Location"),
        (lambda s: swap(Location("head_output[7]", 1, -1), s), "this model has 4 heads"),
        (lambda s: swap(Location("block_output", 1, 7), s), "position 7 is past the end: row 0 has 7 tokens"),
        (lambda s: swap(Location("block_output", 1, -8), s), "position -8 is past the end"),
        (lambda s: swap(Location("block_output", 1, -1), {k: v[:1].repeat(3, 1) for k, v in s.items()}), "batch of 3, the base one of 2"),
        (lambda s: swap(Location("block_output", 1, -1), s, Location("block_output", 1, [0, 1])), "2 positions a row.*has 1"),
        (lambda s: swap(Location("block_output", 1, torch.tensor([1, 2, 3])), s), "for 3 rows, and the batch has 2"),
        (lambda s: swap(Location("block_output", 1, "x3"), s), "positions='x3' does not parse"),
        (lambda s: swap(Location("block_output", 1, torch.tensor(1.5)), s), r"positions=tensor.*: give an index"),
        (lambda s: swap(Location("block_output", 1, -1), s, subspace=Subspace(torch.eye(40))), "width 40 does not fit"),
        (lambda s: swap(Location("block_output", 1, -1), s, subspace=Subspace(torch.ones(33, 32))), "33 directions is larger than the hidden size 32"),
        (lambda s: swap(Location("block_output", 1, -1), s, subspace=Subspace(torch.ones(2, 32))), "must be orthonormal"),
        (lambda s: swap(Location("block_output", 1, -1), s, subspace=Subspace.of_neurons([32], 32)), r"neurons=\[32\]"),
    ],
)  # fmt: skip
def test_bad_input_is_named(what, message):
    model, base, source = TINY["llama"]().eval(), rows("llama"), rows("llama", seed=2)
    with pytest.raises((ReftuneError, TypeError), match=message):
        run(model, Run(base, (what(source),)))


def test_a_location_that_did_not_run_is_said_so():
    model = TINY["llava"]().eval()
    text = {"input_ids": torch.randint(3, 90, (1, 4))}
    assert "llava" in VISION_LANGUAGE
    with pytest.raises(ReftuneError, match="did not run"):
        read(model, text, Location("vision.block_output", 0, 0))
