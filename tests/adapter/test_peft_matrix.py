"""What PEFT asks of any method, of ReFT: every promise over kinds of models and settings of the adapter."""

from __future__ import annotations

import copy
import io
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    prepare_model_for_kbit_training,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import Tensor, nn

import reftune
from tests.tiny_models import TINY, tiny_inputs

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.filterwarnings("ignore::FutureWarning")]


class Layers(nn.Module):
    """A network of nobody's library: (batch, sequence, 8) to (batch, sequence, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)) for _ in range(3))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def layers() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Layers().eval()


@dataclass(frozen=True)
class Kind:
    """A kind of model: how it is made and called, and what its adapters must be told."""

    build: Callable[[], Any]
    inputs: dict[str, Tensor]
    labels: Tensor | None = None
    fields: tuple[tuple[str, Any], ...] = ()
    component: str = "{}"


def answers(inputs: dict[str, Tensor], ids: str) -> Tensor:
    labels = inputs[ids].clone()
    labels[:, :3] = -100
    return labels


TEXT, PAIR = tiny_inputs("llama"), tiny_inputs("t5")
KINDS = {
    "decoder": Kind(TINY["llama"], TEXT, answers(TEXT, "input_ids"), (("task_type", "CAUSAL_LM"),)),
    "encoder": Kind(lambda: TINY["bert"]().base_model, tiny_inputs("bert"), None, (("task_type", "FEATURE_EXTRACTION"),)),
    "classifier": Kind(
        TINY["bert"], tiny_inputs("bert"), torch.tensor([0, 2]),
        (("task_type", "SEQ_CLS"), ("modules_to_save", ["classifier"])),
    ),
    "encoder-decoder": Kind(
        TINY["t5"], PAIR, answers(PAIR, "decoder_input_ids"), (("task_type", "SEQ_2_SEQ_LM"),), "decoder.{}"
    ),
    "plain": Kind(layers, {"x": torch.randn(2, 7, 8, generator=torch.Generator().manual_seed(0))}, None, (), "blocks.{{layer}}.2"),
}  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {
    "loreft-l1": {"method": "loreft", "positions": "l1"},
    "direft-untied-one-layer": {
        "method": "direft", "positions": "f2+l2", "share_weights": False, "layers_to_transform": [1],
    },
    "noreft-all": {"method": "noreft", "positions": "all", "dropout": 0.1, "act_fn": "gelu"},
    "consreft-prompt": {"method": "consreft", "positions": "prompt", "layers_to_transform": [0, -1]},
}  # fmt: skip


SAVED = (
    "method",
    "r",
    "layers_to_transform",
    "component",
    "positions",
    "share_weights",
    "dropout",
    "act_fn",
    "task_type",
)


@dataclass(frozen=True)
class Case:
    kind: Kind
    setting: dict[str, Any]

    def config(self, **changes: Any) -> reftune.ReftConfig:
        fields: dict[str, Any] = {"r": 2, "init": "paper", **dict(self.kind.fields), **self.setting, **changes}
        component = self.kind.component.format(fields.pop("component", "block_output"))
        return reftune.ReftConfig(**copy.deepcopy(fields), component=component)

    def model(self, name: str = "default", **changes: Any) -> Any:
        """A PEFT model whose adapter is not the identity, in evaluation mode."""
        return get_peft_model(self.kind.build(), self.config(**changes), adapter_name=name).eval()

    def output(self, model: nn.Module, **more: Any) -> Tensor:
        with torch.no_grad():
            found = model(**self.kind.inputs, **more)
        return found if isinstance(found, Tensor) else found[0]

    def loss(self, model: nn.Module) -> Tensor:
        if self.kind.labels is None:
            found = model(**self.kind.inputs)
            return ((found if isinstance(found, Tensor) else found[0]) ** 2).mean()
        return model(**self.kind.inputs, labels=self.kind.labels).loss


def everywhere(test: Any) -> Any:
    """Every setting on a decoder, and every other kind of model with some of them."""
    named = [("decoder", name) for name in SETTINGS]
    named += [(kind, name) for number, kind in enumerate(KINDS) for name in list(SETTINGS)[number % 2 :: 3] if number]
    return pytest.mark.parametrize(
        "case", [pytest.param(Case(KINDS[kind], SETTINGS[name]), id=f"{kind}-{name}") for kind, name in named]
    )(test)


def of_each_kind(test: Any) -> Any:
    cases = [pytest.param(Case(kind, SETTINGS["direft-untied-one-layer"]), id=name) for name, kind in KINDS.items()]
    return pytest.mark.parametrize("case", cases)(test)


def own(name: str) -> bool:
    """Whether a parameter is an edit's or a copy of a module that is trained whole."""
    return "reft_" in name or "modules_to_save" in name


def same_tensors(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


@everywhere
def test_an_adapter_is_found_by_its_name_and_alone_is_trainable(case: Case):
    model = case.model("some-name")
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {name for name, _ in model.named_parameters() if own(name) and "some-name" in name}
    count, total = model.get_nb_trainable_parameters()
    assert count == sum(p.numel() for n, p in model.named_parameters() if n in trainable)
    assert total == sum(p.numel() for p in model.parameters())
    assert model.targeted_module_names == list(model.base_model.engine.interventions)
    if "layers_to_transform" in case.setting:
        assert len(model.targeted_module_names) == len(case.setting["layers_to_transform"])
    assert model.active_adapters == ["some-name"] and model.active_adapter == "some-name"
    status = model.get_model_status()
    assert status.available_adapters == ["some-name"] and status.enabled is True and status.merged_adapters == []
    assert status.requires_grad == {"some-name": True} and status.peft_types == {"some-name": "REFT"}
    assert {one.name for one in model.get_layer_status()} >= {
        f"model.{p}.intervention" for p in model.targeted_module_names
    }
    assert all(hasattr(model, name) for name in ("save_pretrained", "push_to_hub", "print_trainable_parameters"))


@everywhere
def test_a_saved_adapter_is_the_same_when_it_is_loaded(case: Case, tmp_path: Path):
    model = case.model()
    expected, tensors = case.output(model), get_peft_model_state_dict(model)
    folder = str(tmp_path / "adapter")
    model.save_pretrained(folder)
    assert {path.name for path in Path(folder).iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "README.md",
    }  # fmt: skip
    assert same_tensors(load_file(f"{folder}/adapter_model.safetensors"), tensors)
    assert "library_name: peft" in Path(folder, "README.md").read_text()
    written = json.loads(Path(folder, "adapter_config.json").read_text())
    assert written["peft_type"] == "REFT" and written["inference_mode"] is True
    read = PeftConfig.from_pretrained(folder)
    given = case.config()
    assert {name: getattr(read, name) for name in SAVED} == {name: getattr(given, name) for name in SAVED}
    ways: list[dict[str, Any]] = [{}, {"low_cpu_mem_usage": True}, {"is_trainable": True}]
    for options in ways:
        again = PeftModel.from_pretrained(case.kind.build(), folder, **options)
        assert again.training is False or options.get("is_trainable")
        assert any(p.requires_grad for p in again.parameters()) is options.get("is_trainable", False)
        again.eval()
        assert torch.equal(case.output(again), expected)
        assert same_tensors(get_peft_model_state_dict(again), tensors)
    again = PeftModel.from_pretrained(case.kind.build(), folder, config=given)
    assert again.peft_config["default"] is given and given.inference_mode
    assert torch.equal(case.output(again), expected)
    other = case.model()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.1 * parameter.requires_grad
    assert not torch.equal(case.output(other), expected)
    set_peft_model_state_dict(other, tensors)
    assert torch.equal(case.output(other), expected)


@everywhere
def test_a_step_of_training_moves_the_adapter_and_nothing_else(case: Case):
    model = case.model().train()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    case.loss(model).backward()
    assert all((parameter.grad is not None) == parameter.requires_grad for parameter in model.parameters())
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5).step()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved and all(own(name) for name in moved)


@everywhere
def test_switched_off_or_unloaded_it_is_the_base_model_to_the_bit(case: Case):
    base = case.kind.build()
    plain, weights = case.output(base), copy.deepcopy(base.state_dict())
    model = get_peft_model(base, case.config()).eval()
    edited = case.output(model)
    assert not torch.equal(edited, plain)
    with model.disable_adapter():
        assert torch.equal(case.output(model), plain)
        with model.disable_adapter():
            assert torch.equal(case.output(model), plain)
        assert torch.equal(case.output(model), plain)
    assert torch.equal(case.output(model), edited)
    tuner: Any = model.base_model
    tuner.disable_adapter_layers()
    assert torch.equal(case.output(model), plain)
    tuner.enable_adapter_layers()
    assert torch.equal(case.output(model), edited)
    unloaded = model.unload()
    assert type(unloaded) is type(case.kind.build()) and same_tensors(unloaded.state_dict(), weights)
    assert torch.equal(case.output(unloaded), plain)
    assert not any(isinstance(module, BaseTunerLayer) for module in unloaded.modules())


@everywhere
def test_several_adapters_are_kept_apart_and_deleted_whole(case: Case, tmp_path: Path):
    model = case.model("default")
    first = case.output(model)
    for name in ("default2", "other_default", "efaul"):
        model.add_adapter(name, case.config(layers_to_transform=[1]))
    assert torch.equal(case.output(model), first) and model.active_adapters == ["default"]
    outputs = {}
    for name in ("default2", "efaul", "other_default"):
        model.set_adapter(name)
        assert model.active_adapters == [name]
        assert {n for n, p in model.named_parameters() if p.requires_grad} == {
            n for n, _ in model.named_parameters() if own(n) and f".{name}." in n
        }
        outputs[name] = case.output(model)
    model.save_pretrained(str(tmp_path), selected_adapters=["default", "efaul"])
    assert {p.name for p in tmp_path.iterdir() if p.is_dir()} == {"efaul"}
    again = PeftModel.from_pretrained(case.kind.build(), str(tmp_path))
    assert torch.equal(case.output(again), first)
    assert again.load_adapter(str(tmp_path / "efaul"), "loaded").missing_keys == []
    assert list(again.peft_config) == ["default", "loaded"] and again.active_adapters == ["default"]
    again.set_adapter("loaded")
    assert torch.equal(case.output(again), outputs["efaul"])
    model.delete_adapter("default2")
    assert not any("default2" in name for name, _ in model.named_parameters())
    assert model.active_adapters == ["other_default"] and torch.equal(case.output(model), outputs["other_default"])
    model.delete_adapter("other_default")
    model.set_adapter("efaul")
    assert torch.equal(case.output(model), outputs["efaul"])
    with pytest.raises(ValueError, match="unknown"):
        model.delete_adapter("unknown")
    assert list(model.peft_config) == ["default", "efaul"]


@of_each_kind
@pytest.mark.parametrize("copied", ["deepcopy", "torch.save"])
def test_a_copy_gives_the_same_and_lives_its_own_life(case: Case, copied: str):
    model = case.model()
    expected = case.output(model)
    if copied == "deepcopy":
        twin = copy.deepcopy(model)
    else:
        torch.save(model, stream := io.BytesIO())
        stream.seek(0)
        twin = torch.load(stream, weights_only=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    assert torch.equal(case.output(twin), expected) and not torch.equal(case.output(model), expected)


@of_each_kind
def test_an_adapter_injected_without_memory_takes_its_saved_tensors(case: Case):
    model = case.model()
    expected, tensors = case.output(model), get_peft_model_state_dict(model)
    tensors = {name.removeprefix("base_model.model."): value for name, value in tensors.items()}
    base = case.kind.build()
    inject_adapter_in_model(case.config(), base, low_cpu_mem_usage=True)
    assert all(p.is_meta for n, p in base.named_parameters() if "reft_" in n)
    found = set_peft_model_state_dict(base, tensors, low_cpu_mem_usage=True)
    assert not found.unexpected_keys and not any(parameter.is_meta for parameter in base.parameters())
    assert torch.equal(case.output(base), expected)


@of_each_kind
def test_rows_of_a_batch_use_the_adapters_they_name(case: Case):
    model = case.model("one")
    model.add_adapter("two", case.config(layers_to_transform=[0], positions="all"))
    outputs = {}
    for name in ("one", "two"):
        model.set_adapter(name)
        outputs[name] = case.output(model)
    with model.disable_adapter():
        outputs["__base__"] = case.output(model)
    for names in (["two", "one"], ["__base__", "two"]):
        mixed = case.output(model, adapter_names=names)
        expected = torch.stack([outputs[name][row] for row, name in enumerate(names)])
        torch.testing.assert_close(mixed, expected, rtol=0, atol=1e-5)


@of_each_kind
def test_what_edits_cannot_do_is_refused_and_changes_nothing(case: Case):
    model = case.model()
    expected = case.output(model)
    for refused in (
        lambda: model.merge_and_unload(),
        lambda: model.merge_adapter(),
        lambda: model.add_weighted_adapter(["default"], [1.0], "sum"),
    ):
        with pytest.raises(reftune.ReftuneError):
            refused()
    assert torch.equal(case.output(model), expected) and list(model.peft_config) == ["default"]


@pytest.mark.parametrize("kind", ["decoder", "encoder", "encoder-decoder"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("setting", ["loreft-l1", "direft-untied-one-layer"])
def test_checkpointed_gradients_are_those_of_the_whole_graph(kind: str, reentrant: bool, setting: str):
    case = Case(KINDS[kind], SETTINGS[setting])
    model = case.model().train()
    case.loss(model).backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    model.zero_grad()
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    case.loss(model).backward()
    for name, gradient in plain.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["decoder", "encoder-decoder"])
def test_generation_under_a_name_without_and_in_half_precision(kind: str):
    case = Case(KINDS[kind], SETTINGS["loreft-l1"])
    inputs = {name: value for name, value in case.kind.inputs.items() if not name.startswith("decoder")}
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_scores": True}
    model = case.model()

    def scores(of: Any, **more: Any) -> Tensor:
        return torch.stack(of.generate(**inputs, **options, **more).scores[:1])

    edited = scores(model)
    plain = scores(case.kind.build().requires_grad_(False))  # which attention kernel runs depends on it
    assert not torch.equal(edited, plain)
    with model.disable_adapter():
        assert torch.equal(scores(model), plain)
    mixed = scores(model, adapter_names=["default", "__base__"])
    torch.testing.assert_close(mixed, torch.stack([edited[0, 0], plain[0, 1]])[None], rtol=0, atol=1e-5)
    assert scores(model.to(torch.bfloat16)).isfinite().all()


def test_embeddings_may_be_given_in_place_of_ids():
    case = Case(KINDS["decoder"], SETTINGS["loreft-l1"])
    model = case.model()
    embeds = model.get_input_embeddings()(TEXT["input_ids"])
    with torch.no_grad():
        given = model(inputs_embeds=embeds, attention_mask=TEXT["attention_mask"])[0]
    assert torch.equal(given, case.output(model))


def test_a_model_prepared_for_training_in_few_bits_trains_its_adapter_alone():
    case = Case(KINDS["decoder"], SETTINGS["loreft-l1"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base: Any = prepare_model_for_kbit_training(case.kind.build())
    assert not any(parameter.requires_grad for parameter in base.parameters())
    model = get_peft_model(base, case.config()).train()
    case.loss(model).backward()
    assert all((parameter.grad is not None) == own(name) for name, parameter in model.named_parameters())
