"""A model's ``forward`` called by itself is a call of the model, and states that are no tokens are edited row by row."""

from __future__ import annotations

import copy
import inspect
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from peft import get_peft_model
from torch import nn

import reftune
from reftune.engine import positions as positions_module
from reftune.engine.hooks import Engine
from reftune.engine.positions import read_layout
from reftune.engine.transformers_names import enable_checkpointing
from reftune.errors import ReftuneError
from tests.engine.test_planning import padded
from tests.tiny_models import TINY, tiny_inputs

SETTINGS: dict[str, Any] = {"r": 2, "positions": "l1", "init": "paper"}


def inputs_of(name: str) -> dict[str, torch.Tensor]:
    """Rows of unequal length; of a causal model with a prompt and a completion."""
    if name == "vit":
        return tiny_inputs(name)
    rows = padded([3, 6], side="right")
    ids, mask = rows["input_ids"], rows["attention_mask"]
    if name == "llama":
        return {**rows, "labels": ids.masked_fill((mask == 0) | (torch.arange(6) < 2), -100)}
    return {**rows, "decoder_input_ids": ids} if name in ("bart", "t5") else rows


def first(output: Any) -> torch.Tensor:
    return output.logits if "logits" in output else output[0]


def backbone() -> nn.Module:
    return TINY["llama"]().model


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", ["attach", "peft"])
@pytest.mark.parametrize("name", ["llama", "gptj", "bert", "deberta_v2", "t5", "vit", "llama backbone"])
def test_a_direct_forward_is_the_models_call(name: str, kind: str, training: bool) -> None:
    if training and name in ("gptj", "t5"):
        pytest.skip("needs labels of its own")
    model = backbone() if name == "llama backbone" else TINY[name]()
    inputs = inputs_of(name)
    component = "encoder.block_output" if name == "t5" else "block_output"
    with torch.no_grad():
        plain = first(model(**inputs))
    config = {**SETTINGS, "component": component}
    if kind == "attach":
        reftune.attach(model, **config)
    else:
        model = get_peft_model(model, reftune.ReftConfig(**config)).get_base_model()
    model.train(training)
    for dropout in (m for m in model.modules() if isinstance(m, nn.Dropout)):
        dropout.p = 0.0
    called = first(model(**inputs))
    assert not torch.allclose(called, plain)
    torch.testing.assert_close(first(model.forward(**inputs)), called, rtol=0, atol=0)


def test_a_call_is_planned_once_and_so_is_a_direct_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    model = TINY["llama"]()
    reftune.attach(model, **SETTINGS)
    engine = Engine.of(model)
    assert engine is not None
    plans: list[Any] = []
    make = engine.planner._plan
    monkeypatch.setattr(engine.planner, "_plan", lambda *args, **kwargs: plans.append(1) or make(*args, **kwargs))
    for call in (model, model.forward, model.__call__):
        plans.clear()
        call(**inputs_of("llama"))
        assert len(plans) == 1
    assert not engine.planner.in_forward


def test_a_forward_that_calls_itself_plans_each_call_by_its_own_arguments() -> None:
    class Halves(type(TINY["bert"]())):  # type: ignore[misc]
        def forward(self, input_ids, attention_mask, **kwargs):  # type: ignore[override]
            if len(input_ids) > 1:
                halves = [self.forward(i[None], m[None]) for i, m in zip(input_ids, attention_mask, strict=True)]
                return {"logits": torch.cat([half["logits"] for half in halves])}
            return super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)

    model, halving = TINY["bert"](), Halves(TINY["bert"]().config).eval()
    halving.load_state_dict(model.state_dict())
    for one in (model, halving):
        torch.manual_seed(0)
        reftune.attach(one, **SETTINGS)
    inputs = inputs_of("bert")
    expected = model(**inputs).logits
    torch.testing.assert_close(halving(**inputs)["logits"], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(halving.forward(**inputs)["logits"], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("component", ["block_output", "mlp_output"])
def test_a_direct_forward_is_recomputed_under_gradient_checkpointing_with_its_edits(component: str) -> None:
    gradients = []
    for direct in (False, True):
        model = backbone()
        torch.manual_seed(0)
        attachment = reftune.attach(model, **SETTINGS, component=component, layers_to_transform=[1, 2])
        model.train()
        enable_checkpointing(model)
        call = model.forward if direct else model
        call(**padded([3, 6]), use_cache=False).last_hidden_state.sum().backward()
        gradients.append([p.grad for p in attachment.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)
    assert any(g is not None and g.any() for g in gradients[1])


def test_the_stand_in_has_the_signature_and_leaves_with_the_edits() -> None:
    model = TINY["bert"]()
    signature = inspect.signature(model.forward)
    with reftune.attach(model, **SETTINGS):
        assert inspect.signature(model.forward) == signature
        kept = model.forward
    assert "forward" not in model.__dict__
    inputs = inputs_of("bert")
    assert torch.equal(kept(**inputs).logits, model(**inputs).logits)  # who kept it has the base's


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copys_direct_forward_is_the_copys(duplicate: Any) -> None:
    model = TINY["bert"]()
    attachment = reftune.attach(model, **SETTINGS)
    other, inputs = duplicate(model), inputs_of("bert")
    before = other(**inputs).logits
    attachment.detach()
    assert torch.equal(other.forward(**inputs).logits, before)
    with torch.no_grad():
        other.classifier.bias.add_(1.0)
    torch.testing.assert_close(other.forward(**inputs).logits, before + 1.0)


class Doubling(ModelHook):
    def post_forward(self, module: nn.Module, output: Any) -> Any:
        output.logits = output.logits * 2
        return output


@pytest.mark.parametrize("first_edits", [True, False])
def test_accelerates_own_forward_goes_with_ours(first_edits: bool) -> None:
    model, inputs = TINY["bert"](), inputs_of("bert")
    plain = model(**inputs).logits
    if first_edits:
        attachment = reftune.attach(model, **SETTINGS)
        edited = model(**inputs).logits
        add_hook_to_module(model, Doubling())
    else:
        add_hook_to_module(model, Doubling())
        torch.manual_seed(0)
        attachment = reftune.attach(model, **SETTINGS)
        edited = model(**inputs).logits / 2
    assert not torch.allclose(edited, plain)
    assert torch.equal(model(**inputs).logits, edited * 2)
    if not first_edits:  # else accelerate's forward holds ours, and doubles what it is given once more
        assert torch.equal(model.forward(**inputs).logits, edited * 2)
    attachment.detach()
    assert torch.equal(model.forward(**inputs).logits, plain * 2)
    remove_hook_from_module(model)
    assert torch.equal(model.forward(**inputs).logits, plain)
    reftune.attach(model, **SETTINGS)
    assert torch.equal(model.forward(**inputs).logits, model(**inputs).logits)


def test_direct_forwards_from_several_threads_are_all_right() -> None:
    model = TINY["bert"]()
    reftune.attach(model, **SETTINGS)
    batches = [padded([3, 6]), padded([5, 2, 6]), padded([1])]
    with torch.no_grad():
        expected = [model(**batch).logits for batch in batches]
        with ThreadPoolExecutor(4) as pool:
            results = list(pool.map(lambda i: model.forward(**batches[i % 3]).logits.detach(), range(60)))
    for i, result in enumerate(results):
        torch.testing.assert_close(result, expected[i % 3])


def test_what_does_not_pass_the_model_is_edited_at_the_same_tokens_or_refused() -> None:
    model, inputs = TINY["bert"](), inputs_of("bert")
    attachment = reftune.attach(model, **SETTINGS)
    hidden = model.bert.embeddings(input_ids=inputs["input_ids"])
    mask = inputs["attention_mask"][:, None, None, :].bool()
    with pytest.raises(ReftuneError, match="do not say where padding is"):
        model.bert.encoder(hidden, attention_mask=mask)
    with pytest.raises(ReftuneError, match="outside of a forward"):
        model.bert.encoder.forward(hidden, attention_mask=mask)
    with pytest.raises(ReftuneError, match="outside of a forward"):
        model.bert.encoder.layer[0](hidden, mask)
    whole = model(**inputs, output_hidden_states=True).hidden_states[-1]
    by_mask = torch.zeros(2, 6, dtype=torch.bool)
    by_mask[[0, 1], [2, 5]] = True
    alone = model.bert.encoder(hidden, attention_mask=mask, intervention_mask=by_mask)[0]
    torch.testing.assert_close(alone, whole)
    with attachment.disabled():
        assert model.bert.encoder.forward(hidden, attention_mask=mask)[0].shape == hidden.shape


def test_a_causal_models_backbone_in_training_does_not_guess_where_prompts_end() -> None:
    model = TINY["llama"]().train()
    reftune.attach(model, **SETTINGS)
    rows = padded([3, 6])
    with pytest.raises(ReftuneError, match="prompt_lengths"):
        model.model(**rows)
    model.model(**rows, prompt_lengths=torch.tensor([2, 3]))


# States that are no tokens


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin0, self.lin1 = nn.Linear(10, 20), nn.Linear(20, 2)

    def forward(self, X: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.lin1(torch.relu(self.lin0(X)))


@pytest.mark.parametrize("kind", ["attach", "peft"])
def test_states_of_two_dimensions_are_edited_everywhere_or_where_a_mask_says(kind: str) -> None:
    torch.manual_seed(0)
    base, X = Mlp(), torch.randn(9, 10)
    config: dict[str, Any] = {"component": "lin0", "positions": "all", "r": 2, "init": "paper"}
    if kind == "attach":
        model: Any = base
        edit: Any = next(iter(reftune.attach(base, **config).edits.values()))
    else:
        model = get_peft_model(base, reftune.ReftConfig(**config))
        edit = next(iter(model.base_model.engine.edits("default").values()))
    lin0: Any = base.lin0
    h = lin0.weight.double() @ X.double().T + lin0.bias.double()[:, None]
    R, W, b = (t.detach().double() for t in (edit.rotation, edit.weight, edit.bias))
    edited = h + R.T @ (W @ h + b[:, None] - R @ h)

    def out(states: torch.Tensor) -> torch.Tensor:
        return (base.lin1.weight.double() @ torch.relu(states) + base.lin1.bias.double()[:, None]).T

    for call in (model, model.forward):
        torch.testing.assert_close(call(X).double(), out(edited), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            call(X, attention_mask=torch.ones(1, 4, 4)).double(), out(edited), rtol=1e-5, atol=1e-5
        )
        chosen = torch.arange(9) % 3 == 0
        for mask in (chosen, chosen[:, None]):
            torch.testing.assert_close(
                model(X, intervention_mask=mask).double(), out(torch.where(chosen, edited, h)), rtol=1e-5, atol=1e-5
            )
    with pytest.raises(ReftuneError, match="intervention_mask"):
        model(X, intervention_mask=torch.ones(4, 2))


@pytest.mark.parametrize("kind", ["attach", "peft"])
def test_a_vector_by_itself_is_one_state(kind: str) -> None:
    torch.manual_seed(0)
    base, X = Mlp(), torch.randn(3, 10)
    plain = base(X)
    config: dict[str, Any] = {"component": "lin0", "positions": "all", "r": 2, "init": "paper"}
    model: Any = base
    if kind == "attach":
        reftune.attach(base, **config)
    else:
        model = get_peft_model(base, reftune.ReftConfig(**config))
    expected = model(X)  # what its rows are edited to, one by one
    assert not torch.allclose(expected, plain)
    for x, edited, unedited in zip(X, expected, plain, strict=True):
        torch.testing.assert_close(model(x), edited)
        for mask in (torch.tensor(1), torch.ones(1), torch.ones(1, 1)):
            torch.testing.assert_close(model(x, intervention_mask=mask), edited)
            torch.testing.assert_close(model(x, intervention_mask=0 * mask), unedited)


def test_tokens_without_a_batch_are_edited_everywhere() -> None:
    class Embedded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.lin = nn.Embedding(9, 10), nn.Linear(10, 4)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.lin(self.embedding(input_ids))

    model, tokens = Embedded(), torch.arange(6)
    plain = model(tokens)
    with reftune.attach(model, component="embedding", positions="all", r=2, init="paper"):
        torch.testing.assert_close(model(tokens), model(tokens[None])[0])
        assert ((model(tokens) - plain).abs().amax(-1) > 1e-6).all()


def test_states_without_tokens_in_an_order_have_no_last_one() -> None:
    model = Mlp()
    reftune.attach(model, component="lin0", positions="l1", r=2)
    for shape in ((9, 10), (10,)):
        with pytest.raises(ReftuneError, match=r"positions='all'.*intervention_mask"):
            model(torch.randn(shape))
    model(torch.randn(9, 10), intervention_mask=torch.ones(9))


@pytest.mark.parametrize("positions", ["all", "l1"])
def test_a_pooled_state_is_edited_once_a_row(positions: str) -> None:
    model, inputs = TINY["bert"](), inputs_of("bert")
    plain = model(**inputs).logits
    attachment = reftune.attach(model, component="bert.pooler.dense", positions=positions, r=2, init="paper")
    if positions == "l1":
        with pytest.raises(ReftuneError, match="Pass an intervention_mask"):
            model(**inputs)
    else:
        seen: list[torch.Tensor] = []
        handle = next(iter(attachment.edits.values())).register_forward_hook(lambda m, a, o: seen.append(a[0]))
        changed = (model(**inputs).logits - plain).abs().amax(-1) > 1e-4
        handle.remove()
        assert changed.all() and seen[0].shape[0] == 2
    changed = (model(**inputs, intervention_mask=torch.tensor([[0], [1]])).logits - plain).abs().amax(-1) > 1e-4
    assert changed.tolist() == [False, True]


def test_a_mask_that_is_not_one_of_tokens_does_not_matter_at_all_positions() -> None:
    model, rows = TINY["llama"](), padded([6, 6])
    whole = torch.ones(2, 1, 6, 6, dtype=torch.bool).tril()
    attachment = reftune.attach(model, **{**SETTINGS, "positions": "all"})
    torch.testing.assert_close(model(**{**rows, "attention_mask": whole}).logits, model(**rows).logits)
    attachment.detach()
    reftune.attach(model, **SETTINGS)
    with pytest.raises(ReftuneError, match="intervention_mask"):
        model(**{**rows, "attention_mask": whole})
    last = torch.zeros(2, 6, dtype=torch.bool)
    last[:, -1] = True
    masked = model(**{**rows, "attention_mask": whole}, intervention_mask=last).logits
    torch.testing.assert_close(masked, model(**rows).logits)


@pytest.mark.parametrize(
    ("answers", "documents", "warned"),
    [
        ([[3, 4, 5]], None, False),
        ([[3, 4, 7]], None, True),
        ([[2, 3], [1, 4, 5]], None, True),
        ([[3, 6, 7]], [0, 4, 8], False),  # packed: one answer a document
        ([[1, 3, 6, 7]], [0, 4, 8], True),
    ],
)
def test_training_on_several_answers_of_a_row_is_warned_of(answers, documents, warned, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(positions_module, "tell_once", lambda logger, line: said.append(line))
    labels = torch.full((len(answers), 8), -100)
    for row, columns in enumerate(answers):
        labels[row, columns] = 5
    arguments = {
        "batch": len(answers), "sequence": 8, "device": torch.device("cpu"), "labels": labels,
        "document_starts": None if documents is None else torch.tensor(documents),
    }  # fmt: skip
    read_layout(**arguments)  # an evaluation
    assert not said
    read_layout(**arguments, must_know_prompt="training")
    assert bool(said) == warned
