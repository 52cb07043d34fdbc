"""Positions under generation: whatever transformers does with the prompt, the same tokens are edited."""

from __future__ import annotations

import warnings

import pytest
import torch

import reftune
from reftune.engine.transformers_names import enable_checkpointing
from tests.tiny_models import CAUSAL, ENCODER_DECODERS, TINY

POSITIONS = ["l1", "f2", "f2+l3", "prompt", "all", "generated", "f1+l2+generated"]


def edited(name: str = "llama", positions: str = "l1", **options):
    model = TINY[name]()
    if name not in ("mixtral", "qwen3_moe", "gpt_oss"):  # torch's grouped matrix product has no float64
        model.double()
    arguments = {"r": 2, "init": "paper", "positions": positions, **options}
    attachment = reftune.attach(model, **arguments)
    torch.manual_seed(1)
    for parameter in attachment.parameters():
        if parameter.shape[0] == 2:
            parameter.data.add_(torch.randn_like(parameter) * 0.5)
    return model, attachment


def padded(lengths: list[int], side: str = "left") -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(lengths))
    width = max(lengths)
    ids, mask = torch.zeros(len(lengths), width, dtype=torch.long), torch.zeros(len(lengths), width, dtype=torch.long)
    for row, n in enumerate(lengths):
        columns = slice(width - n, width) if side == "left" else slice(0, n)
        ids[row, columns] = torch.randint(3, 90, (n,), generator=generator)
        mask[row, columns] = 1
    return {"input_ids": ids, "attention_mask": mask}


def greedy(model, inputs, n: int = 6, **options) -> torch.Tensor:
    """Generated tokens alone; no token ends a text early."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = model.generate(**inputs, max_new_tokens=n, do_sample=False, eos_token_id=None, pad_token_id=0, **options)
    return out[:, -n:]


def by_plain_forwards(model, ids: torch.Tensor, n: int = 6) -> torch.Tensor:
    """The slow reference: every step a full forward of one unpadded row, its prompt length said outright."""
    row, prompt = ids.unsqueeze(0), torch.tensor([len(ids)])
    for _ in range(n):
        with torch.no_grad():
            logits = model(row, prompt_lengths=prompt).logits
        row = torch.cat([row, logits[:, -1:].argmax(-1)], dim=1)
    return row[0, -n:]


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("cache", [True, False], ids=["cached", "uncached"])
def test_a_batch_of_short_and_long_prompts_generates_as_each_row_alone(positions: str, cache: bool):
    model, _ = edited(positions=positions)
    inputs = padded([1, 2, 3, 4, 5, 9])
    together = greedy(model, inputs, use_cache=cache)
    for row in range(6):
        ids = inputs["input_ids"][row][inputs["attention_mask"][row] == 1]
        assert torch.equal(together[row], by_plain_forwards(model, ids)), row


@pytest.mark.parametrize("name", [n for n in CAUSAL if n not in ("mpt", "bloom", "falcon_rw")])
def test_every_architecture_generates_cached_as_by_plain_forwards(name: str):
    model, _ = edited(name, "f1+l2")
    ids = padded([6])["input_ids"]
    assert torch.equal(greedy(model, {"input_ids": ids})[0], by_plain_forwards(model, ids[0]))


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize(
    "options",
    [
        {"prefill_chunk_size": 2},
        {"prefill_chunk_size": 4},
        {"cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 3},
    ],
    ids=["chunks of 2", "chunks of 4", "static cache", "prompt lookup"],
)
def test_chunked_static_and_assisted_generation_give_the_same_tokens(positions: str, options: dict):
    model, _ = edited(positions=positions)
    inputs = padded([5]) if "prompt_lookup_num_tokens" in options else padded([9, 5])
    assert torch.equal(greedy(model, inputs, **options), greedy(model, inputs))


@pytest.mark.parametrize("positions", ["l1", "f2+l3", "all"])
def test_speculative_decoding_with_an_assistant_gives_the_same_tokens(positions: str):
    model, _ = edited(positions=positions)
    assistant = TINY["llama"]().double()
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    inputs = padded([7])
    assert torch.equal(greedy(model, inputs, assistant_model=assistant), greedy(model, inputs))


@pytest.mark.parametrize("positions", ["l1", "f2+l3"])
def test_embeddings_in_place_of_ids_give_the_same_tokens(positions: str):
    model, _ = edited(positions=positions)
    inputs = padded([7, 4])
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    with_embeds = greedy(model, {"inputs_embeds": embeds.detach(), "attention_mask": inputs["attention_mask"]})
    assert torch.equal(with_embeds, greedy(model, inputs))


def test_gradient_checkpointing_which_switches_the_cache_off_gives_the_same_tokens():
    model, _ = edited(positions="f1+l1", component="mlp_output")
    inputs = padded([7, 4])
    expected = greedy(model, inputs)
    enable_checkpointing(model)
    model.train()
    assert torch.equal(greedy(model, inputs), expected)


def test_beams_and_return_sequences_keep_each_rows_prompt():
    model, _ = edited(positions="f2+l2")
    inputs = padded([8, 3])
    for options in ({"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}):
        together = greedy(model, inputs, **options)
        each = options.get("num_return_sequences", 1)
        for row in range(2):
            ids = inputs["input_ids"][row][inputs["attention_mask"][row] == 1].unsqueeze(0)
            assert torch.equal(together[row * each : (row + 1) * each], greedy(model, {"input_ids": ids}, **options))


def test_sampled_return_sequences_are_those_of_their_own_distribution():
    model, attachment = edited(positions="l1")
    inputs = padded([6, 3])
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = model.generate(
            **inputs, do_sample=True, num_return_sequences=4, max_new_tokens=1, output_logits=True,
            return_dict_in_generate=True, pad_token_id=0,
        )  # fmt: skip
    expected = model(**inputs).logits[:, -1].repeat_interleave(4, dim=0)
    torch.testing.assert_close(out.logits[0], expected.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ENCODER_DECODERS)
@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_an_encoder_decoder_generates_cached_as_uncached_and_batched_as_alone(name: str, stack: str):
    model, attachment = edited(name, "f1+l2", component=f"{stack}.block_output")
    inputs = padded([7, 4], side="right")
    together = greedy(model, inputs)
    assert torch.equal(together, greedy(model, inputs, use_cache=False))
    alone = {"input_ids": inputs["input_ids"][1:, :4], "attention_mask": inputs["attention_mask"][1:, :4]}
    assert torch.equal(greedy(model, alone)[0], together[1])
    with attachment.disabled():
        assert not torch.equal(greedy(model, inputs), together), "the edit matters"


def count_calls(attachment) -> list[int]:
    calls: list[int] = []
    for edit in attachment.edits.values():
        edit.register_forward_hook(lambda module, args, output: calls.append(args[0].shape[0]))
    return calls


def test_prompt_positions_run_no_edit_in_decode_steps():
    model, attachment = edited(positions="f2+l2")
    calls = count_calls(attachment)
    greedy(model, padded([6, 5]), n=10)
    assert calls == [8, 8, 8], "once a layer, four tokens of each of two rows, in the prefill alone"


def test_all_positions_run_in_every_step():
    model, attachment = edited(positions="all")
    calls = count_calls(attachment)
    greedy(model, padded([6]), n=5)
    assert calls == [6] * 3 + [1] * 12


def test_an_intervention_mask_holds_for_the_prompt_and_ends_with_it():
    model, attachment = edited(positions="l1")
    inputs = padded([6, 4])
    mask = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    mask[:, -1] = True
    calls = count_calls(attachment)
    masked = greedy(model, inputs, intervention_mask=mask)
    assert calls == [2, 2, 2]
    assert torch.equal(masked, greedy(model, inputs)), "the mask says what l1 says"
    mask[:, -1] = False
    assert not torch.equal(greedy(model, inputs, intervention_mask=mask), masked)


def test_a_second_turn_on_the_cache_of_the_first_equals_a_fresh_start():
    from transformers import DynamicCache

    model, _ = edited(positions="l2")
    first = padded([6])["input_ids"]
    cache = DynamicCache(config=model.config)
    said = greedy(model, {"input_ids": first}, past_key_values=cache)
    conversation = torch.cat([first, said, padded([5])["input_ids"]], dim=1)
    with_cache = greedy(model, {"input_ids": conversation}, past_key_values=cache)
    assert torch.equal(with_cache, greedy(model, {"input_ids": conversation}))


def test_a_cached_prefix_that_would_have_been_edited_is_computed_again():
    from transformers import DynamicCache

    model, attachment = edited(positions="f3+l1")
    ids = padded([9])["input_ids"]
    cache = DynamicCache(config=model.config)
    with attachment.disabled(), torch.no_grad():
        model(ids[:, :5], past_key_values=cache)
    assert torch.equal(greedy(model, {"input_ids": ids}, past_key_values=cache), greedy(model, {"input_ids": ids}))


def test_a_hand_written_loop_without_prompt_lengths_is_refused_and_with_them_is_right():
    model, _ = edited(positions="l1")
    ids = padded([6])["input_ids"]
    with torch.no_grad():
        out = model(ids, use_cache=True)
        with pytest.raises(reftune.ReftuneError, match="prompt_lengths"):
            model(out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values)
        with pytest.raises(reftune.ReftuneError, match="without a cache"):
            model(ids, use_cache=False)
        prompt, row = torch.tensor([6]), ids
        out = model(ids, use_cache=True, prompt_lengths=prompt)
        for _ in range(6):
            token = out.logits[:, -1:].argmax(-1)
            row = torch.cat([row, token], dim=1)
            out = model(token, past_key_values=out.past_key_values, prompt_lengths=prompt)
    assert torch.equal(row[:, -6:], greedy(model, {"input_ids": ids}))


def test_packed_continuous_batching_is_refused():
    model, _ = edited(positions="l1")
    with pytest.raises(reftune.ReftuneError, match="generate_batch"):
        model(torch.tensor([[3, 4, 5]]), read_index=[torch.zeros(1)], write_index=[torch.zeros(1)])


def test_generate_keeps_the_signature_of_the_models_own():
    import inspect

    model, attachment = edited()
    with_edit = inspect.signature(model.generate)
    attachment.detach()
    assert with_edit == inspect.signature(model.generate)
