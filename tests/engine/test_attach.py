"""The engine on every architecture: identity edits, exact places, exact undo."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import nn

import reftune
from reftune.engine.hooks import Engine
from reftune.engine.sites import find_sites
from tests.tiny_models import CAUSAL, ENCODER_DECODERS, TINY, VISION, tiny_inputs

COMPONENTS = ["block_output", "block_input", "mlp_output", "attention_output", "attention_input", "value_output"]
MIXTURES = ["mixtral", "qwen3_moe", "gpt_oss"]


class AddConstant(nn.Module):
    """h + c, large enough that no later layer can hide it."""

    def __init__(self, width: int, r: int):
        super().__init__()
        self.constant = nn.Parameter(torch.linspace(2, 5, width))

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return h + self.constant.to(h.dtype)


def output_of(model: nn.Module, name: str, **extra: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(**tiny_inputs(name), **extra)[0]


def hooks(model: nn.Module) -> list[int]:
    return [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]


def stacks_of(name: str) -> list[str]:
    return ["encoder.", "decoder."] if name in ENCODER_DECODERS else [""]


@pytest.mark.parametrize("name", TINY)
def test_an_identity_edit_changes_no_bit_and_detaching_leaves_no_trace(name: str):
    model = TINY[name]()
    before = output_of(model, name)
    keys, hooks_before = list(model.state_dict()), hooks(model)
    for stack in stacks_of(name):
        for component in COMPONENTS:
            for positions in ("f2+l2", "all"):
                with reftune.attach(model, r=2, component=stack + component, positions=positions):
                    assert torch.equal(output_of(model, name), before), (component, positions)
    assert torch.equal(output_of(model, name), before)
    assert list(model.state_dict()) == keys
    assert hooks(model) == hooks_before
    assert Engine.of(model) is None and "generate" not in vars(model)


def tokens_passing(module: nn.Module, side: str, forward: Callable[[], object]) -> torch.Tensor:
    """The last tensor that passes one side of a module in ``forward()``, its tokens flattened to rows."""
    seen: list[torch.Tensor] = []

    def watch(module: nn.Module, args: tuple, kwargs: dict, output: object = None) -> None:
        tensor = output if side == "output" else (args[0] if args else kwargs["hidden_states"])
        seen.append((tensor[0] if isinstance(tensor, tuple) else tensor).detach())

    register = module.register_forward_hook if side == "output" else module.register_forward_pre_hook
    handle = register(watch, with_kwargs=True)
    forward()
    handle.remove()
    return seen[-1].reshape(-1, seen[-1].shape[-1])


@pytest.mark.parametrize("name", TINY)
def test_a_constant_edit_changes_its_position_and_nothing_before_it_downstream(name: str):
    model = TINY[name]()
    for stack in stacks_of(name):
        for component in COMPONENTS:
            sites = find_sites(model, stack + component, 0)
            module = model.get_submodule(sites[0].module_path)
            side = sites[0].side
            before = tokens_passing(module, side, lambda: output_of(model, name))
            last = output_of(model, name)
            tokens = before.shape[0] // 2
            with reftune.attach(model, method=AddConstant, r=1, layers_to_transform=0, component=stack + component):
                after = tokens_passing(module, side, lambda: output_of(model, name))
                changed = (after != before).any(-1).nonzero().squeeze(-1).tolist()
                assert changed == [tokens - 1, 2 * tokens - 1], (component, "l1 of each of the two rows")
                columns = range(after.shape[-1]) if sites[0].columns is None else sites[0].columns
                rest = [c for c in range(after.shape[-1]) if c not in set(columns)]
                assert torch.equal(after[:, rest], before[:, rest])
                now = output_of(model, name)
                if name in CAUSAL:
                    # Experts run on groups of tokens, whose size changes the last bits of a matrix product.
                    bits = 16 * torch.finfo(last.dtype).eps * float(last.abs().max())
                    exact = {"rtol": 0.0, "atol": bits if name in MIXTURES else 0.0}
                    torch.testing.assert_close(now[:, :-1], last[:, :-1], **exact)
                    assert (now[:, -1] - last[:, -1]).abs().max() > 1e-4


@pytest.mark.parametrize("name", [n for n in TINY if n not in VISION])
def test_an_intervention_mask_replaces_the_positions(name: str):
    model = TINY[name]()
    component = "encoder.block_output" if name in ENCODER_DECODERS else "block_output"
    last = find_sites(model, component, -1)[0]
    states: list[torch.Tensor] = []
    inputs = tiny_inputs(name)
    mask = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    mask[0, 4] = mask[1, 2] = True
    model.get_submodule(last.module_path).register_forward_hook(
        lambda module, args, output: states.append(output[0] if isinstance(output, tuple) else output)
    )
    output_of(model, name)
    with reftune.attach(model, method=AddConstant, r=1, layers_to_transform=-1, component=component):
        output_of(model, name, intervention_mask=mask)
    # The watching hook was there first, so it sees the block's own output: read the change one step later instead.
    model.get_submodule(last.module_path)._forward_hooks.clear()
    with reftune.attach(model, method=AddConstant, r=1, layers_to_transform=-1, component=component):
        model.get_submodule(last.module_path).register_forward_hook(
            lambda module, args, output: states.append(output[0] if isinstance(output, tuple) else output)
        )
        output_of(model, name, intervention_mask=mask)
    assert torch.equal(states[0], states[1])
    assert torch.equal((states[2] != states[0]).any(-1), mask)


def test_several_attachments_work_together_and_detach_in_any_order():
    model = TINY["llama"]()
    base = output_of(model, "llama")
    first = reftune.attach(model, method=AddConstant, r=1, layers_to_transform=0, name="first")
    one = output_of(model, "llama")
    second = reftune.attach(
        model,
        method=AddConstant,
        r=1,
        layers_to_transform=[0, 2],
        component="mlp_output",
        name="second",
        positions="all",
    )
    both = output_of(model, "llama")
    assert not torch.equal(both, one)
    with second.disabled():
        assert torch.equal(output_of(model, "llama"), one)
    first.detach()
    assert not torch.equal(output_of(model, "llama"), base)
    second.detach()
    assert torch.equal(output_of(model, "llama"), base)


def test_the_edits_train_without_peft():
    model = TINY["gpt2"]().requires_grad_(False)
    inputs = tiny_inputs("gpt2")
    with reftune.attach(model, r=2, layers_to_transform=[0, 1], positions="l2", init="paper") as attachment:
        optimizer = torch.optim.AdamW(attachment.parameters(), lr=1e-2)
        losses = []
        for _ in range(8):
            loss = model(**inputs).logits[:, -1].logsumexp(-1).mean() - model(**inputs).logits[:, -1, 5].mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("copy_model", [copy.deepcopy, lambda m: _through_pickle(m)], ids=["deepcopy", "pickle"])
def test_a_copied_model_carries_its_own_edits(copy_model):
    model = TINY["qwen2"]()
    attachment = reftune.attach(model, method="loreft", r=2, component="mlp_output", positions="l1", init="paper")
    before = output_of(model, "qwen2")
    twin = copy_model(model)
    assert torch.equal(output_of(twin, "qwen2"), before)
    for parameter in attachment.parameters():
        parameter.data.mul_(0.5)
    assert torch.equal(output_of(twin, "qwen2"), before)
    assert Engine.of(twin) is not Engine.of(model)
    Engine.of(twin).detach()
    attachment.detach()
    assert torch.equal(output_of(twin, "qwen2"), output_of(model, "qwen2"))


def _through_pickle(model: nn.Module) -> nn.Module:
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


def test_a_module_that_is_no_transformer_is_edited_by_its_path():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    x = torch.randn(4, 5, 6)
    before = model(x)
    with reftune.attach(model, method=AddConstant, r=1, component="0", positions="l1"):
        after = model(x)
    changed = (after != before).any(-1)
    assert not changed[:, :-1].any() and changed[:, -1].all()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"layers_to_transform": [40]}, ["layers_to_transform=[40]", "3 layers", "0 to 2"]),
        ({"component": "block_outputs"}, ["block_outputs", "block_output"]),
        ({"positions": "x3"}, ["positions='x3'", "l1"]),
        ({"method": "loref"}, ["loref", "loreft"]),
        ({"r": 33}, ["r=33", "32"]),
        ({"r": 0}, ["r=0"]),
    ],
)
def test_a_wrong_argument_is_named_and_leaves_the_model_untouched(arguments: dict, words: list[str]):
    model = TINY["llama"]()
    with pytest.raises(reftune.ReftuneError) as error:
        reftune.attach(model, **arguments)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert Engine.of(model) is None and not any("intervention" in key for key in model.state_dict())


def test_a_taken_name_is_refused():
    model = TINY["llama"]()
    reftune.attach(model)
    with pytest.raises(reftune.ReftuneError, match="already has edits of that name"):
        reftune.attach(model)
