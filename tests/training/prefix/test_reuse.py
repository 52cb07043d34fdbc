"""Prefix reuse against the plain path: the same loss, gradients and weights, or off with a reason."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn

import reftune
from reftune.data.collating import CompletionCollator
from reftune.engine.transformers_names import enable_checkpointing
from reftune.training import ReftTrainer, ReftTrainingArguments
from reftune.training.loss import completion_loss
from reftune.training.prefix.reuse import PrefixReuse
from reftune.training.prefix.shared_beginning import shared_beginning
from reftune.training.prefix.store import PrefixStore
from reftune.training.prefix.switch import PrefixSwitch
from reftune.training.supervised_logits import supervised_forward
from tests.tiny_models import TINY

EXACT = [  # a full-attention, a sliding-window, a hybrid, a learned-position, a parallel-block, a norm-after model, ...
    "llama", "mistral", "gemma3", "gpt2", "gpt_neox", "olmo2", "qwen3", "opt", "phi3", "falcon_new", "cohere",
]  # fmt: skip
MIXTURES = ["mixtral", "qwen3_moe", "gpt_oss"]
ADAPTERS = {
    "one layer": {"positions": "l1", "layers_to_transform": [1]},
    "inside a block": {"positions": "l1", "layers_to_transform": [1], "component": "mlp_output"},
    "before a block": {"positions": "l2", "layers_to_transform": [1], "component": "block_input"},
    "first layer's inside": {"positions": "l2", "layers_to_transform": [0, 2], "component": "attention_output"},
    "all layers": {"positions": "l3", "layers_to_transform": "all"},
    "last layer": {"positions": "l1", "layers_to_transform": [-1]},
    "no constant prefix": {"positions": "f1+l1", "layers_to_transform": [1, 2]},
    "untied": {"positions": "f2+l2", "layers_to_transform": [1, 2], "share_weights": False},
    "shared and edited": {"positions": "f2+l2", "layers_to_transform": "all"},
    "every prompt token": {"positions": "prompt", "layers_to_transform": [0, 2], "component": "block_input"},
    "predicting tokens": {"positions": "l1+generated", "layers_to_transform": "all"},
    "generated tokens": {"positions": "generated", "layers_to_transform": [1, 2]},
    "untied, generated tokens too": {
        "positions": "f2+l2+generated",
        "layers_to_transform": [1, 2],
        "share_weights": False,
    },
    "every token": {"positions": "all", "layers_to_transform": "all", "component": "mlp_output"},
}


def examples(count: int = 6, common: int = 3, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of different lengths that begin alike; some prompts are as short as the template allows."""
    generator = torch.Generator().manual_seed(seed)

    def draw(n: int) -> list[int]:
        return torch.randint(3, 90, (n,), generator=generator).tolist()

    def size(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    head, rows = draw(common), []
    for _ in range(count):
        prompt, completion = [*head, *draw(size(1, 8))], draw(size(1, 6))
        rows.append(
            {
                "input_ids": prompt + completion,
                "labels": [-100] * len(prompt) + completion,
                "prompt_length": len(prompt),
            }
        )
    return rows


def tuned(name: str = "llama", dtype: torch.dtype = torch.float64, **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    model = get_peft_model(
        TINY[name](), reftune.ReftConfig(**{"r": 2, "init": "paper", "task_type": "CAUSAL_LM", **changes})
    )
    model = (model if name in MIXTURES else model.to(dtype)).train()
    for module in model.modules():
        if hasattr(module, "inv_freq"):  # rotary angles are float32 in any model, whatever `to` made of them
            module.inv_freq = module.inv_freq.type(torch.float32)
    return model


def batch_of(rows: list[dict[str, Any]], side: str = "right") -> dict[str, torch.Tensor]:
    return CompletionCollator(0, side)(rows)


def loss_and_gradients(model: nn.Module, inputs: dict[str, Any], switch: PrefixSwitch | None = None):
    parameters = [p for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    if switch is None:
        found = supervised_forward(model, inputs)
    else:
        found = switch.forward(model, inputs)
    loss = completion_loss(found.logits, found.targets)
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in parameters]


@pytest.fixture
def float64_throughout(monkeypatch):
    """Let a float64 model's norms stay in float64: they ask for float32 in any case, whose rounding would be all we see."""
    to = torch.Tensor.to

    def keep(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self if self.dtype == torch.float64 and args[:1] == (torch.float32,) else to(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", keep)
    monkeypatch.setattr(torch.Tensor, "float", lambda self: keep(self, torch.float32))


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("name", [*EXACT, *MIXTURES])
def test_loss_and_every_gradient_equal_the_plain_path(name: str, adapter: str, float64_throughout):
    rows, model = examples(), tuned(name, **ADAPTERS[adapter])
    loss, gradients = loss_and_gradients(model, batch_of(rows))
    assert any(bool(g.any()) for g in gradients)
    switch = PrefixSwitch("on", None, [rows])
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if name in MIXTURES else {"rtol": 1e-9, "atol": 1e-9}
    for again in ("computed", "from the store"):
        reused, found = loss_and_gradients(model, batch_of(rows), switch)
        torch.testing.assert_close(reused, loss, **tolerance, msg=again)
        for one, other in zip(found, gradients, strict=True):
            torch.testing.assert_close(one, other, **tolerance)
    assert switch.summary()["hits"] >= 2 * len(rows)


@pytest.mark.parametrize("adapter", ["one layer", "shared and edited", "every token", "untied"])
@pytest.mark.parametrize("mode", ["on", "off"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_rows_in_groups_by_length_give_the_same_loss_and_gradients(
    name: str, mode: str, adapter: str, float64_throughout, monkeypatch
):
    monkeypatch.setattr("reftune.training.prefix.row_groups.ONE_MORE_FORWARD", 1)
    rows, model, forwards = examples(8), tuned(name, **ADAPTERS[adapter]), []
    loss, gradients = loss_and_gradients(model, batch_of(rows))
    whole = supervised_forward(model, batch_of(rows))
    parts = PrefixSwitch(mode, None, [rows]).forward(model, batch_of(rows))
    for row in range(len(rows)):
        torch.testing.assert_close(parts.logits[0, parts.rows == row], whole.logits[0, whole.rows == row])
        assert torch.equal(parts.targets[0, parts.rows == row], whole.targets[0, whole.rows == row])
    model.get_base_model().register_forward_hook(lambda *_: forwards.append(1))
    for _ in range(2):
        forwards.clear()
        found, same = loss_and_gradients(model, batch_of(rows), PrefixSwitch(mode, None, [rows]))
        torch.testing.assert_close(found, loss, rtol=1e-9, atol=1e-9)
        for one, other in zip(same, gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    assert len(forwards) > (3 if mode == "on" else 1), "the check takes two forwards, each group one"


@pytest.mark.parametrize(
    ("memory", "disk"),
    [(10**9, 0), (3000, 0), (3000, 10**9), (0, 10**9), (0, 0)],
    ids=["memory", "too little memory", "memory and disk", "disk", "no room at all"],
)
def test_the_budget_changes_what_is_kept_and_not_what_is_computed(memory: int, disk: int):
    rows, model = examples(10), tuned(positions="l1", layers_to_transform=[1])
    reuse = PrefixReuse(model, PrefixStore(memory, disk))
    reuse.share_beginning_of(lambda: iter(rows))
    batches = [batch_of(rows[:4]), batch_of(rows[4:8]), batch_of(rows[6:])]
    for _ in range(3):
        for batch in batches:
            plain = supervised_forward(model, batch)
            (whole,) = reuse.prepare(model, batch)
            with whole.running() as reduced:
                found = supervised_forward(model, reduced)
            torch.testing.assert_close(found.logits, plain.logits, rtol=1e-9, atol=1e-9)
        reuse.constant.store.next_pass()
    assert reuse.constant.store.memory_used <= memory and reuse.constant.store.disk_used <= disk
    assert (reuse.constant.store.refused > 0) == (memory + disk < 10**9)
    folder = reuse.constant.store._folder
    assert (folder is not None and folder.is_dir()) == (disk > 0 and memory < 10**9)
    reuse.constant.store.close()
    assert folder is None or not folder.exists()


def test_rows_that_left_the_data_make_room_for_new_ones():
    store = PrefixStore(1000, 0)
    block = {"x": torch.zeros(100)}
    for key in (b"a", b"b"):
        store.put(key, block)
    store.put(b"c", block)
    assert store.get(b"c") is None and store.refused == 1
    for _ in range(2):
        store.next_pass()
        store.get(b"a")
    store.put(b"c", block)
    assert store.get(b"c") is not None and store.get(b"b") is None and store.get(b"a") is not None


def test_what_all_prompts_begin_with_is_found_and_never_reaches_an_edited_token():
    rows = examples(common=4)
    common = rows[0]["input_ids"][:4]
    l1, l5 = reftune.parse_positions("l1"), reftune.parse_positions("l5")
    assert shared_beginning(rows, [l1]).tolist() == common
    assert len(shared_beginning(rows, [l5])) <= min(row["prompt_length"] for row in rows) - 5 + 1e-9
    alike = [{"input_ids": [5, 6, 7, 8], "prompt_length": 3}, {"input_ids": [5, 6, 7, 9], "prompt_length": 3}]
    assert shared_beginning(alike, [l1]).tolist() == [5, 6]
    f1, f3l1 = reftune.parse_positions("f1"), reftune.parse_positions("f3+l1")
    assert shared_beginning(alike, [f1]).tolist() == []
    assert shared_beginning(alike, [f1], edited=True).tolist() == [5, 6]
    short = {"input_ids": [5, 6, 7, 8], "prompt_length": 3}  # f3+l1 halves it: one token in front, one behind
    long = {"input_ids": [5, 6, 7, 8, 9, 9], "prompt_length": 6}
    assert shared_beginning([short, long], [f3l1], edited=True).tolist() == [5]


def test_examples_with_the_same_prompt_share_its_keys_and_values():
    row = examples(1)[0]
    n = row["prompt_length"]
    other = {**row, "input_ids": row["input_ids"][:n] + [4, 5], "labels": [-100] * n + [4, 5]}
    model = tuned(positions="l1", layers_to_transform=[1])
    reuse = PrefixReuse(model, PrefixStore(10**9, 0))
    reuse.prepare(model, batch_of([row, other]))
    assert len(reuse.constant.store) == 3, "one prefix, two tails"


def train(folder: Path, reuse: str, steps: int = 0, **changes: Any) -> ReftTrainer:
    model = tuned(dtype=torch.float32, positions="l1", layers_to_transform=[1])
    settings = {
        "per_device_train_batch_size": 4, "num_train_epochs": 3, "learning_rate": 1e-2, "logging_steps": 1, "seed": 1,
        "report_to": "none", "use_cpu": True, "disable_tqdm": True, "prefix_reuse": reuse, "eval_strategy": "epoch",
        "save_strategy": "steps", "save_steps": 3,
    }  # fmt: skip
    trainer = ReftTrainer(
        model=model,
        args=ReftTrainingArguments(output_dir=str(folder), **{**settings, **changes}),
        train_dataset=Dataset.from_list(examples(12)),
        eval_dataset=Dataset.from_list(examples(5, seed=0)),
        data_collator=CompletionCollator(0),
    )
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{steps}") if steps else None)
    return trainer


def weights(trainer: ReftTrainer) -> list[torch.Tensor]:
    return [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad]


@pytest.mark.parametrize(
    "changes",
    [{}, {"gradient_accumulation_steps": 2}, {"prefix_cache_gib": 1e-6}],
    ids=["plain", "accumulated", "tight"],
)
def test_three_shuffled_epochs_end_at_the_same_weights(tmp_path, changes: dict):
    off, on = train(tmp_path / "off", "off", **changes), train(tmp_path / "on", "on", **changes)
    for one, other in zip(weights(on), weights(off), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    assert on.report()["prefix_reuse"] == "on" and off.report()["prefix_reuse"].startswith("off")
    assert on.report()["eval_loss"] == pytest.approx(off.report()["eval_loss"], abs=1e-5)


def test_a_resumed_run_reuses_prefixes_and_ends_at_the_same_weights(tmp_path):
    whole = train(tmp_path, "on")
    resumed = train(tmp_path, "on", steps=6)
    for one, other in zip(weights(resumed), weights(whole), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def refusal(model: nn.Module, rows: list[dict] | None = None, **changes: Any) -> str:
    rows = rows or examples()
    switch = PrefixSwitch("auto", None, [rows])
    inputs = {**batch_of(rows, changes.pop("side", "right")), **changes}
    assert switch._try(model, inputs) is None
    return switch.status


@pytest.mark.parametrize(
    ("positions", "layers", "words"),
    [("all", "all", "only 1 of 3 layers"), ("prompt", [0], "only 1 of 3 layers")],
)
def test_auto_is_off_where_next_to_nothing_is_constant(positions: str, layers, words: str, monkeypatch):
    monkeypatch.setattr("reftune.training.prefix.reuse.WORTH_IT", 0.5)
    assert words in refusal(tuned(positions=positions, layers_to_transform=layers), examples(common=0))


def tokens_run(model: nn.Module, rows: list[dict], block: int) -> int:
    """Tokens that pass a block in one step with prefix reuse, after a first step that fills the store."""
    switch, counted = PrefixSwitch("on", None, [rows]), []
    loss_and_gradients(model, batch_of(rows), switch)
    blocks = model.get_base_model().model.layers
    handle = blocks[block].register_forward_pre_hook(
        lambda module, args, kwargs: counted.append((args[0] if args else kwargs["hidden_states"]).shape[:2].numel()),
        with_kwargs=True,
    )
    loss_and_gradients(model, batch_of(rows), switch)
    handle.remove()
    return sum(counted)


def test_a_step_runs_shared_tokens_once_and_none_after_the_last_prediction():
    rows = examples(common=4)
    longest = max(len(row["input_ids"]) for row in rows) - 1  # the last token predicts nothing
    edited = tuned(positions="f2", layers_to_transform="all")
    assert tokens_run(edited, rows, 2) == 4 + len(rows) * (longest - 4)
    dropping = tuned(positions="f2", layers_to_transform="all", dropout=0.1)  # each row draws its own
    assert tokens_run(dropping, rows, 2) == len(rows) * longest
    last = tuned(positions="l1", layers_to_transform=[1])
    completions = max(len(row["input_ids"]) - row["prompt_length"] for row in rows)
    assert tokens_run(last, rows, 2) == len(rows) * completions


def test_what_makes_it_inexact_switches_it_off_with_a_reason():
    l1 = {"positions": "l1", "layers_to_transform": [1]}
    assert "padded on the left" in refusal(tuned(**l1), side="left")
    assert "not a causal language model" in _bert_refusal()
    checkpointed = tuned(**l1)
    enable_checkpointing(checkpointed)
    assert "gradient checkpointing" in refusal(checkpointed)
    free = tuned(**l1)
    free.get_base_model().model.norm.weight.requires_grad_(True)
    assert "trains too" in refusal(free)
    dropping = tuned(**l1)
    dropping.get_base_model().model.layers[0].self_attn.attention_dropout = 0.1
    assert "dropout" in refusal(dropping)
    assert "takes no" in refusal(tuned("bloom", **l1))
    packed = refusal(tuned(**l1), position_ids=torch.zeros(6, 9, dtype=torch.long))
    assert "position_ids" in packed
    stretched = tuned(**l1)
    stretched.get_base_model().config.rope_parameters["rope_type"] = "dynamic"
    assert "rotary embedding" in refusal(stretched)


def _bert_refusal() -> str:
    model = get_peft_model(TINY["bert"](), reftune.ReftConfig(r=2, positions="l1", layers_to_transform=[1]))
    return refusal(model)


def test_lora_beside_the_edit_switches_it_off():
    import warnings

    lora = get_peft_model(TINY["llama"](), LoraConfig(r=2, target_modules=["q_proj"]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        both = get_peft_model(
            lora.get_base_model(), reftune.ReftConfig(r=2, layers_to_transform=[1]), adapter_name="edit"
        )
    assert "lora" in refusal(both)


def test_a_model_whose_logits_come_out_otherwise_is_caught_by_the_check():
    model = tuned(positions="l1", layers_to_transform=[1])
    layer = model.get_base_model().model.layers[2]
    # An attention that looks at absolute row length, as no obstacle in the list does: the check has to see it.
    layer.register_forward_hook(lambda module, args, output: output + 0.1 * output.shape[1])
    assert "differ from the plain path" in refusal(model)


def test_the_check_is_made_once_for_the_same_base_edits_and_code(monkeypatch):
    checks, check = [], PrefixReuse._check
    monkeypatch.setattr(PrefixReuse, "_check", lambda *args: (checks.append(1), check(*args)))
    monkeypatch.setattr("reftune.training.prefix.reuse._PROVEN", {})
    rows = examples()

    def began(change: Any = lambda model: None, **config: Any) -> int:
        model = tuned(**{"positions": "l1", "layers_to_transform": [1], **config})
        change(model.get_base_model().model.layers[2])
        checks.clear()
        switch = PrefixSwitch("auto", None, [rows])
        found = switch.forward(model, batch_of(rows))
        torch.testing.assert_close(found.logits, supervised_forward(model, batch_of(rows)).logits)
        return len(checks)

    assert [began(), began(), began()] == [1, 0, 0]
    assert began(positions="l2") == began(layers_to_transform=[0]) == began(method="direft") == 1
    assert began(lambda layer: layer.mlp.down_proj.weight.data.mul_(2)) == 1
    assert began() == 0


def test_a_remembered_check_does_not_speak_for_other_code(monkeypatch):
    def fresh() -> Any:
        return tuned(positions="l1", layers_to_transform=[1])

    rows = examples()
    PrefixSwitch("on", None, [rows]).forward(fresh(), batch_of(rows))
    kind = type(fresh().get_base_model().model.layers[2])
    plain = kind.forward

    def by_length(self: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        return plain(self, hidden_states, *args, **kwargs) + 0.1 * hidden_states.shape[1]

    monkeypatch.setattr(kind, "forward", by_length)
    assert "differ from the plain path" in refusal(fresh())


def test_asking_for_it_where_it_is_impossible_is_an_error():
    model = tuned("bloom", positions="l1", layers_to_transform=[1])
    rows = examples()
    with pytest.raises(reftune.ReftuneError, match="prefix_reuse='on' is not possible"):
        PrefixSwitch("on", None, [rows]).forward(model, batch_of(rows))
    with pytest.raises(reftune.ReftuneError, match="must be one of auto, on, off"):
        PrefixSwitch("maybe", None, [])
    with pytest.raises(reftune.ReftuneError, match="prefix_cache_gib=-1"):
        PrefixSwitch("auto", -1.0, [])


def test_a_batch_that_begins_otherwise_takes_the_plain_path_alone():
    rows, model = examples(), tuned(positions="l1", layers_to_transform=[1])
    switch = PrefixSwitch("auto", None, [rows])
    loss_and_gradients(model, batch_of(rows), switch)
    others = examples(seed=9)
    loss, gradients = loss_and_gradients(model, batch_of(others))
    found, same = loss_and_gradients(model, batch_of(others), switch)
    torch.testing.assert_close(found, loss)
    assert switch.status == "on"


def test_the_model_is_whole_again_after_a_step_and_after_an_error(monkeypatch):
    rows, model = examples(), tuned(positions="l1", layers_to_transform=[1])
    before = [id(module) for module in model.modules()]
    paused = copy.deepcopy([i.paused for i in model.base_model.engine.interventions.values()])
    switch = PrefixSwitch("on", None, [rows])

    def broken(*_: Any) -> None:
        raise RuntimeError("in the middle")

    switch.forward(model, batch_of(rows))
    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="in the middle"):
        patched.setattr("reftune.training.prefix.switch.supervised_forward", broken)
        switch.forward(model, batch_of(rows))
    loss_and_gradients(model, batch_of(rows), switch)
    assert [id(module) for module in model.modules()] == before
    assert [i.paused for i in model.base_model.engine.interventions.values()] == paused
    assert model.training
