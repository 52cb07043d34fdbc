"""ReFT through PEFT's own interface: every call that PEFT users know, and the traps under it."""

from __future__ import annotations

import copy
import io
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

import reftune
from reftune.adapter.config import new_adapter
from reftune.engine.hooks import Engine
from tests.tiny_models import CAUSAL, ENCODER_DECODERS, ENCODERS, TINY, tiny_inputs

INPUTS = tiny_inputs("llama")


def config(**changes) -> reftune.ReftConfig:
    settings = {"r": 2, "layers_to_transform": [0, -1], "positions": "f2+l2", "task_type": "CAUSAL_LM"}
    return reftune.ReftConfig(**{**settings, **changes})


def shake(model: nn.Module, seed: int = 1) -> None:
    """Move every trainable parameter off its start; rotations are brought back by the edits themselves."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn(parameter.shape, generator=generator) * 0.3


def logits(model: nn.Module, **extra) -> torch.Tensor:
    with torch.no_grad():
        return model(**INPUTS, **extra)[0]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    TINY["llama"]().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def load(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base)


@pytest.fixture
def trained(base: Path):
    model = get_peft_model(load(base), config(share_weights=False))
    shake(model)
    return model.eval()


@pytest.mark.parametrize("name", TINY)
def test_every_architecture_trains_saves_reloads_bit_exactly_and_unloads(name: str, tmp_path: Path):
    task = "CAUSAL_LM" if name in CAUSAL else "SEQ_2_SEQ_LM" if name in ENCODER_DECODERS else None
    component = "decoder.block_output" if name in ENCODER_DECODERS else "mlp_output"
    model, inputs = TINY[name](), tiny_inputs(name)

    def output(of: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return of(**inputs)[0]

    before = output(model)
    tuned = get_peft_model(model, config(component=component, task_type=task))
    assert torch.equal(output(tuned), before)
    shake(tuned)
    after = output(tuned.eval())
    assert not torch.equal(after, before)
    tuned.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(TINY[name](), str(tmp_path))
    assert torch.equal(output(again), after)
    plain = again.unload()
    assert torch.equal(output(plain), before) and type(plain) is type(model)


def test_only_the_edits_train_and_their_count_is_printed(trained, capsys):
    trained.print_trainable_parameters()
    assert "trainable params: 520" in capsys.readouterr().out
    names = [name for name, parameter in trained.named_parameters() if parameter.requires_grad]
    assert len(names) == 2 * 2 * 3 and all(".intervention.reft_" in name for name in names)


def test_a_rank_4_edit_of_a_576_wide_layer_has_4612_parameters():
    edit = reftune.edits.make_edit("loreft", 576, 4)
    assert sum(parameter.numel() for parameter in edit.parameters()) == 4612


def test_the_adapter_file_is_as_small_as_its_parameters(trained, tmp_path: Path):
    trained.save_pretrained(tmp_path)
    parameters = sum(4 * p.numel() for p in trained.parameters() if p.requires_grad)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size <= 1.1 * parameters + 4096
    assert not list(tmp_path.glob("*.bin")) and not list(tmp_path.glob("*.pkl"))


@pytest.mark.parametrize("name", ["default", "a", "weight", "rotation", "layers", "e"])
@pytest.mark.parametrize("low_memory", [False, True], ids=["plain", "low_cpu_mem_usage"])
def test_an_adapter_reloads_bit_exactly_under_any_name(trained, base, tmp_path, name: str, low_memory: bool):
    expected = logits(trained)
    trained.save_pretrained(tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Adapter name .* should not be contained in the prefix")
        again = PeftModel.from_pretrained(
            load(base), str(tmp_path / "adapter"), adapter_name=name, low_cpu_mem_usage=low_memory
        )
    assert torch.equal(logits(again), expected)
    again.save_pretrained(tmp_path / "again")
    folder = tmp_path / "again" if name == "default" else tmp_path / "again" / name
    once_more = PeftModel.from_pretrained(load(base), str(folder))
    assert torch.equal(logits(once_more), expected)


def test_the_auto_classes_of_peft_and_transformers_load_an_adapter_folder(trained, tmp_path):
    expected = logits(trained)
    trained.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path)), expected)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(plain), expected)
    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(plain.generate(**INPUTS, **options), trained.generate(**INPUTS, **options))  # pyright: ignore
    assert isinstance(PeftConfig.from_pretrained(tmp_path), reftune.ReftConfig)


def test_a_second_adapter_on_other_layers_switches_and_leaves_cleanly(trained, tmp_path):
    first = logits(trained)
    trained.add_adapter("second", config(layers_to_transform=1, positions="all", component="mlp_output", init="paper"))
    assert torch.equal(logits(trained), first), "adding does not activate"
    trained.set_adapter("second")
    second = logits(trained)
    assert not torch.equal(second, first)
    active = {n for n, p in trained.named_parameters() if p.requires_grad}
    assert active and all(".second." in name for name in active)
    trained.set_adapter("default")
    assert torch.equal(logits(trained), first)
    trained.base_model.set_adapter(["default", "second"])
    both = logits(trained)
    assert not torch.equal(both, first) and not torch.equal(both, second)
    trained.set_adapter("default")
    trained.delete_adapter("second")
    assert torch.equal(logits(trained), first)
    assert not any("second" in name for name, _ in trained.named_modules())
    trained.save_pretrained(tmp_path)
    trained.load_adapter(str(tmp_path), "third")
    trained.set_adapter("third")
    assert torch.equal(logits(trained), first)


def test_deleting_the_active_adapter_leaves_the_other_active(trained):
    expected = logits(trained)
    trained.add_adapter("second", config(layers_to_transform=1))
    trained.set_adapter("second")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trained.delete_adapter("second")
    trained.set_adapter("default")
    assert torch.equal(logits(trained), expected)


def test_disabling_gives_the_base_model_and_enabling_the_edit_again(trained, base):
    expected, plain = logits(trained), logits(load(base))
    with trained.disable_adapter():
        assert torch.equal(logits(trained), plain)
        assert torch.equal(logits(trained, prompt_lengths=torch.tensor([3, 3])), plain)
    assert torch.equal(logits(trained), expected)


def test_unloading_and_adapting_again_starts_clean(trained, base):
    plain = trained.unload()
    assert torch.equal(logits(plain), logits(load(base)))
    assert not hasattr(plain, "peft_config") and Engine.of(plain) is None
    assert not any(isinstance(module, BaseTunerLayer) for module in plain.modules())
    again = get_peft_model(plain, config())
    assert torch.equal(logits(again), logits(load(base)))


def test_rows_of_one_batch_use_their_own_adapters(trained, base):
    trained.add_adapter("second", config(layers_to_transform=1, positions="l1"))
    trained.set_adapter("second")
    shake(trained, seed=5)
    second = logits(trained)
    trained.set_adapter("default")
    first = logits(trained)
    mixed = logits(trained, adapter_names=["second", "default"])
    torch.testing.assert_close(mixed, torch.stack([second[0], first[1]]), rtol=0, atol=1e-5)
    plain = logits(load(base))
    assert torch.equal(logits(trained, adapter_names=["__base__", "__base__"]), plain)
    assert torch.equal(logits(trained), first), "afterwards the active adapter is back"
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": 2}
    together = trained.generate(**INPUTS, adapter_names=["__base__", "default"], **options)
    assert torch.equal(together[1], trained.generate(**INPUTS, **options)[1])
    with trained.disable_adapter():
        assert torch.equal(together[0], trained.generate(**INPUTS, **options)[0])
    with pytest.raises(reftune.ReftuneError, match="nobody"):
        logits(trained, adapter_names=["default", "nobody"])


@pytest.mark.parametrize("copied", [copy.deepcopy, "pickle"], ids=["deepcopy", "pickle"])
def test_a_copied_peft_model_gives_the_same_and_lives_its_own_life(trained, copied):
    expected = logits(trained)
    if copied == "pickle":
        stream = io.BytesIO()
        torch.save(trained, stream)
        stream.seek(0)
        twin = torch.load(stream, weights_only=False)
    else:
        twin = copied(trained)
    assert torch.equal(logits(twin), expected)
    for parameter in trained.parameters():
        parameter.data.mul_(0.9)
    assert torch.equal(logits(twin), expected)


def test_training_and_evaluation_mode_differ_by_dropout_alone(base):
    model = get_peft_model(load(base), config(dropout=0.5))
    shake(model)
    lengths = torch.tensor([5, 5])
    model.eval()
    assert torch.equal(logits(model, prompt_lengths=lengths), logits(model, prompt_lengths=lengths))
    quiet = get_peft_model(load(base), config())
    quiet.load_state_dict(model.state_dict())
    quiet.train()
    torch.testing.assert_close(logits(quiet, prompt_lengths=lengths), logits(model, prompt_lengths=lengths))
    model.train()
    assert not torch.equal(logits(model, prompt_lengths=lengths), logits(model, prompt_lengths=lengths))


@pytest.mark.parametrize("order", ["lora first", "loaded in the same order"])
def test_lora_and_reft_share_one_base(base, tmp_path, order: str):
    lora = get_peft_model(load(base), LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj", "v_proj"]))
    alone = logits(lora)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You are trying to modify a model with PEFT for a second time")
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        both = get_peft_model(lora.get_base_model(), config(), adapter_name="edit")
        assert torch.equal(logits(both), alone)
        both.set_requires_grad("edit")
        shake(both)
        expected = logits(both)
        both.save_pretrained(tmp_path / "edit", selected_adapters=["edit"])
        lora.save_pretrained(tmp_path / "lora", selected_adapters=["default"])
        assert {p.name for p in (tmp_path / "edit" / "edit").iterdir()} >= {"adapter_model.safetensors"}
        again = PeftModel.from_pretrained(load(base), str(tmp_path / "lora"))
        again = PeftModel.from_pretrained(again.get_base_model(), str(tmp_path / "edit" / "edit"), adapter_name="edit")
        assert torch.equal(logits(again), expected)


def test_a_classifier_head_is_trained_saved_and_loaded_with_the_edit(tmp_path):
    TINY["bert"]().save_pretrained(tmp_path / "base")
    inputs = tiny_inputs("bert")

    def fresh() -> nn.Module:
        return AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")

    before = fresh()(**inputs).logits
    model = get_peft_model(
        fresh(), reftune.ReftConfig(r=1, positions="f1", task_type="SEQ_CLS", modules_to_save=["classifier"])
    )
    assert torch.equal(model(**inputs).logits, before)
    assert any("classifier" in n for n, p in model.named_parameters() if p.requires_grad)
    loss = model(**inputs, labels=torch.tensor([0, 2])).loss
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    shake(model)
    after = model.eval()(**inputs).logits
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(fresh(), str(tmp_path / "adapter"))
    assert torch.equal(again(**inputs).logits, after)
    assert torch.equal(again.unload()(**inputs).logits, before)


@pytest.mark.parametrize("name", [*ENCODERS, "llama"])
def test_bare_backbones_and_encoders_count_every_attended_token_as_prompt(name: str):
    model = TINY[name]().base_model
    tuned = get_peft_model(model, config(positions="l1", init="paper", task_type="FEATURE_EXTRACTION")).train()
    inputs = tiny_inputs(name)
    inputs["attention_mask"][0, -3:] = 0
    seen: list[torch.Tensor] = []
    for edit in tuned.base_model.engine.edits("default").values():  # type: ignore[union-attr]
        edit.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    tuned(**inputs)
    assert [len(x) for x in seen] == [2, 2]


class TwoStep(nn.Module):
    """A user's edit with modules inside modules, whose names contain each other."""

    def __init__(self, width: int, r: int):
        super().__init__()
        self.down = nn.Linear(width, r)
        self.inner = nn.Sequential(nn.Linear(r, r), nn.Tanh(), nn.Linear(r, width))

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return h + self.inner(self.down(h.float())).to(h.dtype)


def test_a_users_own_module_with_nested_modules_is_a_method(base, tmp_path):
    model = get_peft_model(load(base), config(method=TwoStep))
    shake(model)
    expected = logits(model.eval())
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(load(base), str(tmp_path))), expected)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_edits_stay_in_float32_on_a_base_of_any_precision(dtype: torch.dtype, tmp_path):
    model = get_peft_model(TINY["llama"]().to(dtype), config(layers_to_transform="all"))
    shake(model)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    out = logits(model.eval())
    assert out.dtype == dtype and out.isfinite().all()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(TINY["llama"]().to(dtype), str(tmp_path))
    assert torch.equal(logits(again), out)


@pytest.mark.parametrize("settings", [{"share_weights": False}, {"parametrization": "householder"}], ids=str)
def test_without_autocast_edits_take_the_dtype_of_their_blocks(settings: dict, tmp_path):
    def fresh() -> nn.Module:
        return TINY["llama"]().to(torch.bfloat16)

    def kinds(model: nn.Module) -> set[torch.dtype]:
        return {value.dtype for name, value in model.state_dict().items() if "reft_" in name}

    model = get_peft_model(fresh(), config(**settings), autocast_adapter_dtype=False)
    assert kinds(model) == {torch.bfloat16}
    shake(model)
    out = logits(model.eval())
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(fresh(), str(tmp_path), autocast_adapter_dtype=False)
    assert kinds(again) == {torch.bfloat16} and torch.equal(logits(again), out)
    again.load_adapter(str(tmp_path), "second", autocast_adapter_dtype=False, low_cpu_mem_usage=True)
    again.set_adapter("second")
    assert kinds(again) == {torch.bfloat16} and torch.equal(logits(again), out)
    again.load_adapter(str(tmp_path), "third")
    again.set_adapter("third")
    assert kinds(again) == {torch.bfloat16, torch.float32}


@pytest.mark.parametrize(
    ("component", "saved"),
    [
        ("mlp_output", "down_proj"),
        ("mlp_output", "mlp"),
        ("mlp_output", "self_attn"),
        ("model.norm", "norm"),
        ("block_output", "layers.2"),
        ("block_output", "model"),
    ],
)
def test_a_module_that_is_trained_whole_cannot_hold_or_carry_an_edit(component: str, saved: str):
    layers = "all" if component == "model.norm" else [2]
    model = TINY["llama"]()
    before = logits(model)
    with pytest.raises(reftune.ReftuneError, match="modules_to_save=.*another component"):
        get_peft_model(model, config(component=component, layers_to_transform=layers, modules_to_save=[saved]))
    assert Engine.of(model) is None and torch.equal(logits(model), before)
    tuned = get_peft_model(model, config(component=component, layers_to_transform=layers))
    with pytest.raises(reftune.ReftuneError, match="modules_to_save=.*another component"):
        tuned.add_adapter("second", config(layers_to_transform=[0], modules_to_save=[saved]))


def test_a_module_under_an_edited_one_is_trained_saved_and_loaded_with_it(base, tmp_path):
    changes = {"modules_to_save": ["self_attn", "down_proj"], "positions": "all"}
    model = get_peft_model(load(base), config(**changes))
    shake(model)
    expected = logits(model.eval())
    model.base_model.set_scale("default", 0.0)  # pyright: ignore[reportCallIssue]
    assert not torch.allclose(logits(model), expected)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(load(base), str(tmp_path))), expected)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"r": 0}, "r=0"),
        ({"r": 2.5}, "r=2.5"),
        ({"positions": "first"}, "positions='first'"),
        ({"method": "lora"}, "method='lora'"),
        ({"layers_to_transform": "some"}, "layers_to_transform='some'"),
        ({"layers_to_transform": []}, "layers_to_transform="),
        ({"dropout": 1.5}, "dropout=1.5"),
        ({"act_fn": "rlu"}, "rlu"),
        ({"init": "zero"}, "init='zero'"),
    ],
)
def test_a_wrong_field_is_named_when_the_config_is_made(change: dict, words: str):
    with pytest.raises(reftune.ReftuneError) as error:
        config(**change)
    assert words in str(error.value)


def test_a_wrong_layer_leaves_the_peft_model_as_it_was(trained):
    expected = logits(trained)
    with pytest.raises(reftune.ReftuneError, match="0 to 2"):
        trained.add_adapter("wrong", config(layers_to_transform=[40]))
    assert "wrong" not in trained.peft_config and torch.equal(logits(trained), expected)


def test_merging_is_refused_with_the_reason_and_changes_nothing(trained):
    expected = logits(trained)
    with pytest.raises(reftune.ReftuneError, match="positions.*cannot be merged"):
        trained.merge_and_unload()
    for names in (None, ["default"], ["nobody"]):
        with pytest.raises(reftune.ReftuneError, match="not merged in place"):
            trained.merge_adapter(adapter_names=names)
    with pytest.raises(reftune.ReftuneError, match=r"nothing to unmerge: disable_adapter\(\)"):
        trained.unmerge_adapter()
    assert torch.equal(logits(trained), expected)


@pytest.mark.parametrize("names", [["nobody"], ["default", "nobody"], ["__base__"]])
def test_merging_a_name_that_is_not_there_is_refused_and_loses_nothing(names):
    constant = config(method="lobireft", positions="all", component="mlp_output")
    tuned = get_peft_model(TINY["gpt2"](), constant)
    shake(tuned)
    expected = tuned.eval()(**tiny_inputs("gpt2")).logits
    with pytest.raises(reftune.ReftuneError, match=r"which has \['default'\]"):
        tuned.merge_and_unload(adapter_names=names)
    assert torch.equal(tuned(**tiny_inputs("gpt2")).logits, expected)


def test_lora_beside_is_merged_and_unmerged_around_the_edits(base):
    lora = get_peft_model(load(base), LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj"]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        both = get_peft_model(lora.get_base_model(), config(init="paper"), adapter_name="edit").eval()
    expected = logits(both)
    lora.merge_adapter()
    torch.testing.assert_close(logits(both), expected, rtol=1e-4, atol=1e-4)
    lora.unmerge_adapter()
    torch.testing.assert_close(logits(both), expected, rtol=1e-4, atol=1e-4)


def test_an_adapter_without_a_head_goes_beside_one_that_has_it(base):
    model = get_peft_model(load(base), config(modules_to_save=["lm_head"]), "head")
    model.add_adapter("edit", config())
    model.set_adapter("edit")
    model.add_adapter("third", config())
    assert {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad} == {"edit"}
    head: Any = model.get_base_model().lm_head
    assert not head.active_adapters


def test_a_constant_at_every_token_merges_into_a_bias_that_exists():
    model = TINY["gpt2"]()
    inputs = tiny_inputs("gpt2")
    tuned = get_peft_model(
        model, config(method="lobireft", positions="all", component="mlp_output", layers_to_transform="all")
    )
    shake(tuned)
    expected = tuned.eval()(**inputs).logits
    merged = tuned.merge_and_unload(safe_merge=True)
    torch.testing.assert_close(merged(**inputs).logits, expected, rtol=1e-5, atol=1e-5)
    assert Engine.of(merged) is None


def test_a_constant_without_a_bias_to_take_it_is_refused(base):
    tuned = get_peft_model(load(base), config(method="lobireft", positions="all", component="mlp_output"))
    with pytest.raises(reftune.ReftuneError, match="no bias"):
        tuned.merge_and_unload()


def test_an_edit_that_depends_on_the_state_is_refused_even_at_every_token(base):
    tuned = get_peft_model(load(base), config(positions="all"))
    with pytest.raises(reftune.ReftuneError, match="depends on the hidden state"):
        tuned.merge_and_unload()


def test_attached_edits_and_peft_adapters_do_not_mix_unnoticed(base, trained):
    model = load(base)
    reftune.attach(model)
    with pytest.raises(reftune.ReftuneError, match="detach them"):
        get_peft_model(model, config())
    with pytest.raises(reftune.ReftuneError, match="add_adapter"):
        reftune.attach(trained.get_base_model())


def test_what_peft_reads_of_a_base_is_no_warning_where_we_put_an_adapter_on_it(tmp_path: Path) -> None:
    said = "`is_gradient_checkpointing` is deprecated"
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        new_adapter(TINY["llama"](), config()).save_pretrained(str(tmp_path))
        PeftModel.from_pretrained(TINY["llama"](), str(tmp_path))
        ours = [str(one.message) for one in heard if said in str(one.message)]
        get_peft_model(TINY["llama"](), LoraConfig(target_modules=["q_proj"]))  # PEFT alone
        pefts = [str(one.message) for one in heard if said in str(one.message)]
    assert ours == [] and bool(pefts) == hasattr(PreTrainedModel, "is_activation_checkpointing")
