"""Where edits go: every component of every tiny architecture, checked against what a real forward does."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

from reftune.engine.sites import COMPONENTS, Site, attention_module, find_sites, find_stacks, resolve_layers
from reftune.errors import ReftuneError
from tests.forward_probe import STACKS, model_of, record, sites_or_none
from tests.tiny_models import ENCODER_DECODERS, LAYERS, TINY


@pytest.mark.parametrize(("name", "prefix"), STACKS)
def test_every_component_resolves_in_every_layer_with_the_width_a_forward_shows(name: str, prefix: str) -> None:
    model = model_of(name)
    sites: list[Site] = []
    for component in [*COMPONENTS, "head_output[0]", "head_output[3,1]"]:
        found = sites_or_none(name, prefix, component)
        if found is None:
            with pytest.raises(ReftuneError, match="no cross-attention"):
                find_sites(model, prefix + component)
            continue
        assert [site.layer for site in found] == list(range(2 if name in ENCODER_DECODERS else LAYERS))
        sites += found
    for site, hidden in zip(sites, record(name, sites), strict=True):
        assert site.stack is not None and site.layer is not None
        assert site.block_path == site.stack.block_paths[site.layer]
        assert site.module_path.startswith(site.block_path)
        if site.columns is None:
            assert hidden.shape[-1] == site.width
        else:
            assert len(site.columns) == len(set(site.columns)) == site.width
            assert 0 <= min(site.columns) and max(site.columns) < hidden.shape[-1]
            assert torch.equal(hidden[..., site.index], hidden[..., list(site.columns)])


def test_heads_keep_the_order_asked_for() -> None:
    (site,) = find_sites(model_of("llama"), "head_output[3, 0]", [1])
    assert site.columns == (*range(24, 32), *range(8)) and site.index == [*range(24, 32), *range(8)]
    (site,) = find_sites(model_of("llama"), "head_output[1,2]", [1])
    assert site.columns == range(8, 24) and site.index == slice(8, 24)


@pytest.mark.parametrize(
    ("component", "message"),
    [
        ("head_output[4]", r"head_output=\[4\]: this model has 4 heads, 0 to 3"),
        ("head_output[1,1]", r"head_output=\[1, 1\]: head 1 is named twice"),
        ("blok_output", "did you mean 'block_output'"),
        ("head_output", r"did you mean 'head_output\[0\]'"),
        ("decoder.blok_output", "did you mean 'block_output'"),
        ("decoder.block_output", "one stack of blocks, write 'block_output'"),
        ("model.layers.{layer}.mlp.down_prj", "did you mean 'model.layers.{layer}.mlp.down_proj'"),
        ("model.layers.{layer}", None),
        ("model.layers", "holds whole blocks"),
        ("model.layers.{layer}.mlp:inputs", "after the colon comes input or output"),
        ("model.layers.{layer}.self_attn.{layer}", "write {layer} once"),
        ("model.layers{layer}.mlp", "write {layer} once"),
        ("model.rotary_emb", "width of the output of a LlamaRotaryEmbedding here is not known"),
        ("mlp", "several modules end with 'mlp'"),
        ("cross_attention_output", "layer 2 of this model has no such place: it has no cross-attention"),
    ],
)
def test_a_component_that_cannot_be_found_says_what_to_write(component: str, message: str | None) -> None:
    if message is None:
        assert find_sites(model_of("llama"), component)
        return
    with pytest.raises(ReftuneError, match=message):
        find_sites(model_of("llama"), component)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([40], r"layers_to_transform=\[40\]: this model has 30 layers, 0 to 29"),
        (-31, r"layers_to_transform=\[-31\]: this model has 30 layers, 0 to 29"),
        ([3, 30, 31], r"layers_to_transform=\[30, 31\]"),
        ([1, -29], r"layers_to_transform=\[1, -29\]: layer 1 is named twice"),
        ([], 'name at least one layer, or "all"'),
        ("some", "layers_to_transform='some': expected a layer number"),
        (1.5, "layers_to_transform=1.5: expected a layer number"),
        ([True, "2"], "expected a layer number"),
    ],
)
def test_layers_that_do_not_exist_are_refused(layers: Any, message: str) -> None:
    with pytest.raises(ReftuneError, match=message):
        resolve_layers(layers, 30)


def test_layers_count_from_the_end_and_keep_their_order() -> None:
    assert resolve_layers([5, -1, 0], 30) == [5, 29, 0]
    assert resolve_layers(-2, 30) == [28]
    assert resolve_layers(range(2), 30) == [0, 1]
    assert resolve_layers("all", 3) == [0, 1, 2]
    assert [site.layer for site in find_sites(model_of("llama"), layers_to_transform=[2, 0])] == [2, 0]


def test_an_encoder_decoder_names_its_stack() -> None:
    model = model_of("t5")
    assert [stack.name for stack in find_stacks(model)] == ["encoder", "decoder"]
    with pytest.raises(ReftuneError, match="write 'encoder.block_output' or 'decoder.block_output'"):
        find_sites(model, "block_output")
    (site,) = find_sites(model, "encoder.block_output", 0)
    assert (site.module_path, site.stack and site.stack.owner_path) == ("encoder.block.0", "encoder")
    (site,) = find_sites(model, "encoder.block.{layer}.layer.0", 1)  # a module path that begins with a stack's name
    assert (site.block_path, site.module_path) == ("encoder.block.1", "encoder.block.1.layer.0")


def test_a_vision_language_model_means_its_language_stack() -> None:
    model = model_of("llava")
    assert {s.name: s.module_path for s in find_stacks(model)} == {
        "vision": "model.vision_tower.encoder.layers",
        "language": "model.language_model.layers",
    }
    assert [replaced(s) for s in find_sites(model, "mlp_output")] == [
        replaced(s) for s in find_sites(model, "language.mlp_output")
    ]
    assert find_sites(model, "vision.block_output")[0].module_path == "model.vision_tower.encoder.layers.0"


def replaced(site: Site) -> tuple[int | None, str, int]:
    return site.layer, site.module_path, site.width


PATHS = [
    ("llama", "model.layers.{layer}", "block_output"),
    ("llama", "model.layers.{layer}:input", "block_input"),
    ("llama", "model.layers.{layer}.mlp.down_proj", "mlp_output"),
    ("llama", "layers.{layer}.mlp", None),
    ("llama", "model.layers.{layer}.mlp.down_proj:input", None),
    ("llama", "model.layers.{layer}.mlp.act_fn", None),
    ("llama", "model.layers.{layer}.self_attn", None),
    ("llama", "model.layers.{layer}.input_layernorm", None),
    ("phi3", "model.layers.{layer}.self_attn.qkv_proj", None),
    ("olmo2", "model.layers.{layer}.self_attn.k_norm", None),
    ("gpt2", "transformer.h.{layer}.attn.c_attn", None),
    ("bert", "bert.encoder.layer.{layer}.attention", None),
    ("bert", "bert.encoder.layer.{layer}.attention.self", None),
    ("bert", "bert.encoder.layer.{layer}.intermediate", None),
    ("bert", "bert.encoder.layer.{layer}.output", "block_output"),
    ("bert", "bert.encoder.layer.{layer}.output:input", None),
    ("opt", "model.decoder.layers.{layer}.activation_fn", None),
    ("t5", "decoder.block.{layer}.layer.2", "decoder.block_output"),
    ("mixtral", "model.layers.{layer}.mlp", "mlp_output"),
]


@pytest.mark.parametrize(("name", "path", "component"), PATHS)
def test_a_module_path_is_a_site_with_the_width_a_forward_shows(name: str, path: str, component: str | None) -> None:
    sites = find_sites(model_of(name), path)
    seen = record(name, sites)
    assert [hidden.shape[-1] for hidden in seen] == [site.width for site in sites]
    assert all(site.stack and site.block_path == site.stack.block_paths[site.layer or 0] for site in sites)
    if component is not None:
        for hidden, same in zip(seen, record(name, find_sites(model_of(name), component)), strict=True):
            torch.testing.assert_close(hidden, same)


def test_modules_outside_and_inside_the_blocks_are_named_without_a_layer() -> None:
    model = model_of("llama")
    for path, block in [
        ("model.norm", "model.norm"),
        ("lm_head:input", "lm_head"),
        ("model.layers.1.mlp", "model.layers.1"),
    ]:
        (site,) = find_sites(model, path)
        assert (site.layer, site.block_path) == (None, block)
        assert record("llama", [site])[0].shape[-1] == site.width == 32
    assert find_sites(model, "model.embed_tokens")[0].width == 32
    with pytest.raises(ReftuneError, match="names one module"):
        find_sites(model, "model.norm", 1)


@pytest.mark.parametrize("path", ["self_attn.q_norm", "mlp.experts"])
def test_modules_that_do_not_work_on_one_vector_per_token_are_refused(path: str) -> None:
    with pytest.raises(ReftuneError, match="each head by itself|regrouped by expert"):
        find_sites(model_of("qwen3_moe"), f"model.layers.{{layer}}.{path}")


@pytest.mark.parametrize(
    ("name", "target"), [("llama", "q_proj"), ("llama", "down_proj"), ("gpt2", "c_attn"), ("bert", "dense")]
)
def test_a_model_with_a_lora_adapter_has_the_same_sites(name: str, target: str) -> None:
    from peft import LoraConfig, get_peft_model

    model = TINY[name]()
    plain = {c: find_sites(model, c) for c in [*COMPONENTS, "head_output[1]"] if c != "cross_attention_output"}
    wrapped = get_peft_model(model, LoraConfig(target_modules=[target], r=2, fan_in_fan_out=name == "gpt2"))
    for component, before in plain.items():
        assert find_sites(model, component) == before
        assert [s.module_path for s in find_sites(wrapped, component)] == [
            f"base_model.model.{s.module_path}" for s in before
        ]
    if name == "llama":
        (site,) = find_sites(wrapped, "model.layers.{layer}.mlp.down_proj", 1)
        assert (site.module_path, site.width) == ("base_model.model.model.layers.1.mlp.down_proj", 32)


def test_a_bare_backbone_has_the_sites_of_the_whole_model() -> None:
    whole = model_of("llama")
    for component in ["query_output", "head_output[1]", "model.layers.{layer}.mlp.down_proj"]:
        backbone = find_sites(whole.get_submodule("model"), component)
        assert [f"model.{s.module_path}" for s in backbone] == [s.module_path for s in find_sites(whole, component)]


def test_our_own_child_of_a_block_is_not_part_of_the_architecture() -> None:
    model = TINY["llama"]()
    before = {c: find_sites(model, c) for c in COMPONENTS if c != "cross_attention_output"}
    for block in model.model.layers:
        decoy = nn.ModuleDict(
            {name: nn.Linear(32, 32) for name in ("q_proj", "k_proj", "v_proj", "o_proj", "down_proj")}
        )
        block.intervention = nn.ModuleList([decoy])
        block.mlp.intervention = decoy
    assert {c: find_sites(model, c) for c in before} == before


def test_in_a_hybrid_all_layers_means_those_that_have_the_component() -> None:
    config = tf.Qwen3NextConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, linear_num_value_heads=2, linear_num_key_heads=2, linear_key_head_dim=8,
        linear_value_head_dim=8, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16,
        shared_expert_intermediate_size=16, layer_types=["linear_attention"] * 3 + ["full_attention"],
    )  # fmt: skip
    model = tf.Qwen3NextForCausalLM(config)
    assert [site.layer for site in find_sites(model, "block_output")] == [0, 1, 2, 3]
    assert [site.layer for site in find_sites(model, "mlp_output")] == [0, 1, 2, 3]
    assert [site.layer for site in find_sites(model, "attention_output")] == [3]
    with pytest.raises(ReftuneError, match="layer 1 of this model has no such place: it has no self-attention"):
        find_sites(model, "attention_output", [1])
    (query,) = find_sites(model, "query_output")  # the projection holds a gate as well, head by head
    assert (query.width, model.get_submodule(query.module_path).out_features) == (64, 128)
    assert query.columns == tuple(c for head in range(4) for c in range(32 * head, 32 * head + 16))


def test_a_fused_projection_of_unknown_order_is_refused() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.num_heads = 4
            self.query_key_value = nn.Linear(32, 96)
            self.dense = nn.Linear(32, 32)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.ModuleDict({"attention": Attention()}) for _ in range(2)])

    assert len(find_sites(Model(), "attention_output")) == 2
    with pytest.raises(ReftuneError, match="the order of queries, keys and values in Attention.query_key_value"):
        find_sites(Model(), "key_output")
    with pytest.raises(ReftuneError, match="there is none: name one by a module path"):
        find_sites(Model(), "mlp_output")


def test_a_model_without_blocks_says_so() -> None:
    with pytest.raises(ReftuneError, match="no list of blocks with attention"):
        find_sites(nn.Sequential(nn.Linear(2, 2)), "block_output")


def test_a_chain_of_modules_around_a_model_is_not_taken_for_its_stack() -> None:
    chain = nn.Sequential(model_of("llama"), nn.Identity())
    assert [stack.module_path for stack in find_stacks(chain)] == ["0.model.layers"]


def test_sites_can_be_hashed_compared_and_pickled() -> None:
    sites = find_sites(model_of("bloom"), "value_output") + find_sites(model_of("llama"), "head_output[1]")
    assert pickle.loads(pickle.dumps(sites)) == sites
    assert len(set(sites)) == len(sites)


def test_the_attention_module_of_a_block_is_found() -> None:
    assert (
        type(attention_module(model_of("bert").get_submodule("bert.encoder.layer.0"))).__name__ == "BertSelfAttention"
    )
    decoder = model_of("bart").get_submodule("model.decoder.layers.0")
    assert attention_module(decoder, cross=True) is decoder.encoder_attn
    assert attention_module(model_of("llama").get_submodule("model.norm")) is None
