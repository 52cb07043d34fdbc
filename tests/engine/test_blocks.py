"""The parts of a block, checked against what a real forward does with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

from reftune.engine.sites import Site, attention_module, find_sites, find_stacks
from tests.forward_probe import STACKS, changed_at, model_of, record, sites_or_none
from tests.tiny_models import CAUSAL, ENCODER_DECODERS, TINY

FUSED = ["gpt2", "gpt_neox", "phi3", "bloom", "mpt", "falcon", "falcon_new", "falcon_rw"]
POST_NORM = {"bert", "roberta", "distilbert", "deberta_v2", "bart"}  # a norm follows the residual sum
BRANCH_NORM = {"gemma2", "gemma3", "olmo2"}  # a norm lies between the branch and the residual sum
PLAIN_SUM = [(n, p) for n, p in STACKS if n not in POST_NORM | BRANCH_NORM]


@pytest.mark.parametrize(("name", "prefix"), PLAIN_SUM)
def test_attention_output_and_mlp_output_are_the_terms_of_the_residual_sum(name: str, prefix: str) -> None:
    names = ["block_input", "attention_output", "cross_attention_output", "mlp_output", "block_output"]
    for layer in range(2):
        sites = [found[layer] for c in names if (found := sites_or_none(name, prefix, c)) is not None]
        *terms, total = record(name, sites)
        # OPT's feed-forward works on all tokens of the batch in one row.
        torch.testing.assert_close(sum(term.view_as(total) for term in terms), total, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", sorted(POST_NORM - {"bart"}))
def test_in_a_post_norm_encoder_the_terms_enter_before_the_norm(name: str) -> None:
    block = model_of(name).get_submodule(find_stacks(model_of(name))[0].block_paths[0])
    norms = [module for module in block.modules() if isinstance(module, nn.LayerNorm)]
    sites = [
        find_sites(model_of(name), c)[0] for c in ("block_input", "attention_output", "mlp_output", "block_output")
    ]
    start, attention, mlp, end = record(name, sites)
    torch.testing.assert_close(norms[1](norms[0](start + attention) + mlp), end, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", sorted(BRANCH_NORM))
def test_where_a_branch_is_normalised_the_terms_come_before_that_norm(name: str) -> None:
    block = model_of(name).get_submodule(find_stacks(model_of(name))[0].block_paths[1])
    sites = [
        find_sites(model_of(name), c)[1] for c in ("block_input", "attention_output", "mlp_output", "block_output")
    ]
    start, attention, mlp, end = record(name, sites)
    middle = start + block.post_attention_layernorm(attention)
    torch.testing.assert_close(middle + block.post_feedforward_layernorm(mlp), end, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [n for n, p in STACKS if p == "" and n not in ("vit", "llava")])
def test_a_query_acts_on_its_own_position_and_a_key_or_value_on_those_that_attend_to_it(name: str) -> None:
    after = find_sites(model_of(name), "head_output[0,1,2,3]", 1)
    (before,) = record(name, after)
    for component in ("query_output", "key_output", "value_output"):
        (site,) = find_sites(model_of(name), component, 1)
        (changed,) = record(name, after, at=site, by=lambda hidden, site=site: changed_at(hidden, site, position=2))
        positions = set((changed - before).abs().amax(dim=(0, 2)).gt(1e-5).nonzero().flatten().tolist())
        if component == "query_output":
            assert positions == {2}
        elif name in CAUSAL:
            assert 3 in positions and not positions & {0, 1}
        else:
            assert {1, 3} <= positions
        if component == "value_output":  # keys and values are told apart: the result is linear in the values
            (twice,) = record(name, after, at=site, by=lambda hidden, site=site: changed_at(hidden, site, 2, 2.0))
            torch.testing.assert_close(twice - before, 2 * (changed - before), rtol=1e-3, atol=1e-5)
        elif component == "key_output":
            (twice,) = record(name, after, at=site, by=lambda hidden, site=site: changed_at(hidden, site, 2, 2.0))
            assert not torch.allclose(twice - before, 2 * (changed - before), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", [*FUSED, "modernbert"])
def test_zeroing_the_value_columns_of_one_head_silences_only_the_heads_that_read_it(name: str) -> None:
    head_sites = find_sites(model_of(name), "head_output[0,1,2,3]", 1)
    (site,) = find_sites(model_of(name), "value_output", 1)
    assert site.columns is not None
    (before,) = record(name, head_sites)
    size = 8
    readers = 4 // (site.width // size)  # query heads a value head serves
    for head in range(site.width // size):
        columns = list(site.columns)[head * size : (head + 1) * size]

        def silence(hidden: Tensor, columns: list[int] = columns) -> Tensor:
            hidden = hidden.clone()
            hidden[..., columns] = 0
            return hidden

        (after,) = record(name, head_sites, at=site, by=silence)
        mine = range(head * readers * size, (head + 1) * readers * size)
        assert after[..., mine.start : mine.stop].abs().max() == 0
        others = [c for c in range(32) if c not in mine]
        torch.testing.assert_close(after[..., others], before[..., others])


def split_by_the_model(name: str, attention: Any, fused: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and values (batch, sequence, channels), as the model's own code cuts them."""
    if name == "gpt2":
        return fused.split(attention.split_size, dim=2)
    if name == "phi3":
        heads, kv = attention.config.num_attention_heads, attention.num_key_value_heads
        return fused.split([heads * attention.head_dim, kv * attention.head_dim, kv * attention.head_dim], dim=-1)
    if name == "gpt_neox":
        return fused.view(*fused.shape[:2], -1, 3 * attention.head_size).chunk(3, dim=-1)
    if name == "bloom":  # (batch, heads, sequence, head size)
        return tuple(part.transpose(1, 2) for part in attention._reshape(fused))
    return attention._split_heads(fused)


@pytest.mark.parametrize("name", ["gpt2", "phi3", "gpt_neox", "bloom", "falcon", "falcon_new", "falcon_rw"])
def test_fused_columns_are_those_that_the_model_splits_off(name: str) -> None:
    sites = [find_sites(model_of(name), c, 0)[0] for c in ("query_output", "key_output", "value_output")]
    attention = attention_module(model_of(name).get_submodule(sites[0].block_path))
    fused = record(name, sites)[0]
    parts = [part.flatten(2) for part in split_by_the_model(name, attention, fused)]
    if name == "falcon_new":  # Falcon repeats each key and value head for the queries that share it
        parts[1:] = [part.unflatten(2, (2, 2, 8))[:, :, :, 0].flatten(2) for part in parts[1:]]
    for site, part in zip(sites, parts, strict=True):
        assert torch.equal(fused[..., site.index], part)
    assert sorted(c for site in sites for c in site.columns or ()) == list(range(fused.shape[-1]))


def codegen() -> tf.PreTrainedModel:
    config = tf.CodeGenConfig(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4, n_ctx=64)
    return tf.CodeGenForCausalLM(config)


def gpt_bigcode(multi_query: bool) -> tf.PreTrainedModel:
    config = tf.GPTBigCodeConfig(
        vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64, multi_query=multi_query, pad_token_id=0
    )
    return tf.GPTBigCodeForCausalLM(config)


@pytest.mark.parametrize(
    "build",
    [codegen, lambda: gpt_bigcode(True), lambda: gpt_bigcode(False)],
    ids=["codegen", "multi_query", "multi_head"],
)
def test_classes_that_depart_from_the_usual_fused_layout_are_known(build: Callable[[], tf.PreTrainedModel]) -> None:
    model = build().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.0, 0.2)
    after = find_sites(model, "head_output[0,1,2,3]", 1)
    (before,) = record("gpt2", after, model=model)
    positions = {}
    for component in ("query_output", "key_output", "value_output"):
        (site,) = find_sites(model, component, 1)
        (changed,) = record("gpt2", after, model, at=site, by=lambda hidden, site=site: changed_at(hidden, site, 2))
        positions[component] = set((changed - before).abs().amax(dim=(0, 2)).gt(1e-5).nonzero().flatten().tolist())
    assert positions == {"query_output": {2}, "key_output": {2, 3, 4, 5, 6}, "value_output": {2, 3, 4, 5, 6}}
    (value,) = find_sites(model, "value_output", 1)
    (silent,) = record("gpt2", after, model, at=value, by=lambda hidden: hidden.index_fill(-1, index_of(value), 0.0))
    assert silent.abs().max() == 0


def index_of(site: Site) -> Tensor:
    assert site.columns is not None
    return torch.tensor(list(site.columns))


# OLMo 2 normalises the queries of all heads together: a change of one reaches all.
@pytest.mark.parametrize("name", [n for n in TINY if n not in ENCODER_DECODERS and n != "olmo2"])
def test_head_output_covers_what_the_model_calls_that_head(name: str) -> None:
    # Query columns of head 2, changed everywhere, reach the columns of head 2 alone.
    (whole,) = find_sites(model_of(name), "head_output[0,1,2,3]", 1)
    (head,) = find_sites(model_of(name), "head_output[2]", 1)
    (query,) = find_sites(model_of(name), "query_output", 1)
    size = query.width // 4
    columns = list(range(query.width) if query.columns is None else query.columns)[2 * size : 3 * size]

    def change(hidden: Tensor) -> Tensor:
        hidden = hidden.clone()
        hidden[..., columns] += torch.linspace(-1.0, 1.0, size)
        return hidden

    before, after = (record(name, [whole])[0], record(name, [whole], at=query, by=change)[0])
    different = set((after - before).abs().flatten(0, -2).amax(dim=0).gt(1e-5).nonzero().flatten().tolist())
    assert head.columns is not None and different and different <= set(head.columns)
    assert len(head.columns) == size == whole.width // 4
