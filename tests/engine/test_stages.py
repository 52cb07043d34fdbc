"""Vision models in stages: the channels and the number of states change on the way, and every edit has its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

import reftune
from reftune.errors import ReftuneError

IMAGE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def swin(kind: str = "Swin", depths: tuple[int, ...] = (2, 2)) -> Any:
    sizes: dict[str, Any] = {"image_size": 32, "patch_size": 2, "embed_dim": 8, "num_heads": [2, 4], "window_size": 4}
    torch.manual_seed(0)
    config = getattr(tf, f"{kind}Config")(**sizes, depths=list(depths))
    return getattr(tf, f"{kind}Model")(config, add_pooling_layer=False).eval()


def states_at(model: Any, path: str, side: str) -> Tensor:
    """What passes a module, read by a hook of our own."""
    seen: list[Tensor] = []

    def note(module: Any, args: Any, output: Any) -> None:
        passed = args if side == "input" else output
        seen.append((passed if isinstance(passed, Tensor) else passed[0]).detach().clone())

    with model.get_submodule(path).register_forward_hook(note), torch.no_grad():
        model(IMAGE)
    return seen[0]


def edit_paths(model: Any) -> list[str]:
    return [path for path, _ in model.named_modules() if path.endswith("reft_edits.default")]


@pytest.mark.parametrize("kind", ["Swin", "Swinv2", "DonutSwin"])
@pytest.mark.parametrize("depths", [(1, 1), (2, 1)])
@pytest.mark.parametrize("positions", ["all", "l1", "f2"])
def test_a_stages_edits_have_the_channels_and_the_states_of_their_side(kind, depths, positions) -> None:
    model = swin(kind, depths)
    paths = ["encoder.layers.0", "encoder.layers.1"]
    for component, side in (("block_output", "output"), ("block_input", "input")):
        before = [states_at(model, path, side) for path in paths]
        with reftune.attach(model, component=component, positions=positions, r=2, init="paper") as attached:
            edits = list(attached.edits.values())
            assert [edit.width for edit in edits] == [states.shape[-1] for states in before]
            seen = [states_at(model, path, "input") for path in edit_paths(model)]
        chosen = {"all": slice(None), "l1": slice(-1, None), "f2": slice(0, 2)}[positions]
        torch.testing.assert_close(seen[0], before[0][:, chosen].flatten(0, 1))
        assert seen[1].shape == before[1][:, chosen].flatten(0, 1).shape


def test_the_last_state_of_every_stage_is_its_own() -> None:
    model, size = swin(), {0: 64, 1: 64}
    for layer in range(2):
        before = states_at(model, f"encoder.layers.{layer}", "output")
        with reftune.attach(model, layers_to_transform=[0, 1], positions="l1", r=2) as attached:  # the identity
            edits: list[Any] = list(attached.edits.values())
            edits[layer].bias.data.add_(1.0)
            after = states_at(model, f"encoder.layers.{layer}", "output")
        changed = (after - before).abs().amax(-1) > 1e-6
        assert changed.shape == (2, size[layer])
        assert changed.nonzero().tolist() == [[0, size[layer] - 1], [1, size[layer] - 1]]


@pytest.mark.parametrize(
    ("component", "width"),
    [
        ("encoder.layers.0.blocks.1", 8),
        ("encoder.layers.1.blocks.{layer}", 16),
        ("encoder.layers.0.downsample", 16),
        ("encoder.layers.0.downsample.reduction:input", 32),
        ("encoder.layers.1.blocks.0.attention.query", 16),
    ],
)
def test_modules_inside_a_stage_are_named_by_path(component: str, width: int) -> None:
    model = swin("Swinv2") if "query" in component else swin()
    component = component.replace("attention.query", "attention.self.query")
    with torch.no_grad():
        plain = model(IMAGE).last_hidden_state
        with reftune.attach(model, component=component, positions="all", r=2, init="paper") as attached:
            assert {edit.width for edit in attached.edits.values()} == {width}
            assert not torch.allclose(model(IMAGE).last_hidden_state, plain)
        assert torch.equal(model(IMAGE).last_hidden_state, plain)


def segformer() -> Any:
    sizes: dict[str, Any] = {"hidden_sizes": [8, 16, 16, 32], "depths": [1] * 4, "num_attention_heads": [1, 1, 2, 2]}
    return tf.SegformerModel(tf.SegformerConfig(**sizes)).eval()


def pvt_v2() -> Any:
    sizes: dict[str, Any] = {"hidden_sizes": [8, 16, 16, 32], "depths": [1] * 4, "num_attention_heads": [1, 1, 2, 2]}
    return tf.PvtV2Model(tf.PvtV2Config(**sizes)).eval()


def cvt() -> Any:
    return tf.CvtModel(tf.CvtConfig(embed_dim=[8, 16, 32], num_heads=[1, 2, 4], depth=[1, 2, 3])).eval()


@pytest.mark.parametrize("make", [segformer, pvt_v2, cvt])
@pytest.mark.parametrize("component", ["block_output", "block_input"])
@pytest.mark.parametrize("layers", [[0], [1], "all"])
def test_stages_that_pass_maps_are_refused_when_the_adapter_is_made(make, component, layers) -> None:
    model = make()  # their states are (batch, channels, height, width)
    with pytest.raises(ReftuneError, match="do not end in their channels|no list of blocks"):
        reftune.attach(model, component=component, layers_to_transform=layers, positions="all", r=2)
    assert not edit_paths(model)


def test_states_that_do_not_end_in_their_channels_are_refused() -> None:
    with reftune.attach(segformer(), component="mlp_output", positions="l1", r=2, init="paper") as attached:
        attached.engine.model(IMAGE)
    with reftune.attach(swin(), component="encoder.layers.0.downsample:input", positions="all", r=2) as attached:
        with pytest.raises(ReftuneError, match="ends in its channels"):
            attached.engine.model(IMAGE)


@pytest.mark.parametrize("component", ["mlp_output", "attention_output", "query_output"])
def test_all_leaves_out_no_stage_that_has_several_such_places(component: str) -> None:
    model = swin(depths=(2, 1))
    for layers in ("all", [0]):
        with pytest.raises(ReftuneError, match="layer 0 .* several attention modules"):
            reftune.attach(model, component=component, layers_to_transform=layers, positions="all", r=2)
    with reftune.attach(model, component=component, layers_to_transform=[1], positions="all", r=2):
        model(IMAGE)


def test_a_list_of_lists_is_no_stack_of_blocks() -> None:
    sizes: dict[str, Any] = {"hidden_sizes": [8, 16, 16, 32], "depths": [1] * 4, "num_attention_heads": [1, 2, 2, 4]}
    model = tf.PvtModel(tf.PvtConfig(image_size=32, sequence_reduction_ratios=[2, 2, 1, 1], **sizes)).eval()
    with pytest.raises(ReftuneError, match="several stacks"):
        reftune.attach(model, r=2)
    with torch.no_grad():
        plain = model(IMAGE).last_hidden_state
        with reftune.attach(model, component="encoder.block.1.block_output", positions="all", r=2, init="paper"):
            assert not torch.allclose(model(IMAGE).last_hidden_state, plain)
