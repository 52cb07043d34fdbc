from typing import Any

import pytest
import torch
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import reftune
from reftune.causal.aligned import Aligned
from reftune.causal.alignment import Das, SigmoidMask
from reftune.causal.bridge import from_das, set_interchange, subspace_target
from reftune.causal.explain import explain
from reftune.causal.interchange import Intervention, Run, read, run
from reftune.causal.locations import Location
from reftune.data.tokenising import Encoding
from reftune.edits import make_edit
from reftune.errors import ReftuneError
from tests.tiny_models import TINY, VOCAB


def ids(seed: int, batch: int = 3, length: int = 6) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {"input_ids": torch.randint(3, 96, (batch, length))}


def aligned(layer: int = 1) -> Aligned:
    torch.manual_seed(7)
    return Aligned(Location("block_output", layer, -1), Das({"left": 3, "right": 2}, 32).eval())


@pytest.mark.parametrize("method", ["consreft", "loreft"])
def test_an_alignment_becomes_an_adapter_that_is_the_interchange_with_the_average(method, tmp_path):
    model, found, base = TINY["llama"]().eval(), aligned(), ids(1)
    target = subspace_target(model, found, "right", ids(2, batch=8))
    R = found.alignment.subspace("right").rotation
    states = read(model, ids(2, batch=8), found.location)[0][:, 0]
    torch.testing.assert_close(target, (states @ R.T).mean(0))

    def set_to_target(h):
        return h + (target - h @ R.T) @ R

    with torch.no_grad():
        plain = model(**base).logits
        expected = run(model, Run(base, (Intervention(found.location, set_to_target),))).logits
        adapted = from_das(model, found, "right", target, positions="l1", method=method).eval()
        torch.testing.assert_close(adapted(**base).logits, expected)
        adapted.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(TINY["llama"]().eval(), str(tmp_path)).eval()
        assert torch.equal(again(**base).logits, adapted(**base).logits)
        with adapted.disable_adapter():
            assert torch.equal(adapted(**base).logits, plain)


def test_the_loreft_form_trains_within_the_aligned_subspace_alone():
    model, found, base = TINY["gpt2"]().eval(), aligned(), ids(1)
    adapted = from_das(model, found, "left", torch.zeros(3), positions="l1", method="loreft")
    R = found.alignment.subspace("left").rotation
    (edit,) = adapted.base_model.engine.edits("default").values()
    edit.rotation.requires_grad = False
    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    labels = base["input_ids"].clone()
    labels[:, :4] = -100
    losses = []
    for _ in range(5):
        loss = adapted(**base, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert torch.equal(edit.rotation, R)
    state = torch.randn(4, 32)
    change = edit(state) - state
    torch.testing.assert_close(change, change @ R.T @ R, atol=1e-5, rtol=1e-5)


def tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{i}": i for i in range(VOCAB)}
    made = Tokenizer(models.WordLevel(words, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="w0", unk_token="w0")


PROMPTS = ["w5 w9 w12 w40", "w7 w8 w31 w2 w77"]


def test_an_explanation_names_tokens_places_and_the_worth_of_each_site():
    model: Any = TINY["llama"]().eval()
    with torch.no_grad():
        unembedding = model.get_output_embeddings().weight
        attached = reftune.attach(model, method="lobireft", r=1, layers_to_transform=[0, 2], positions="f1+l1")
        strong: Any = attached.edits["model.layers.2"]
        direction = unembedding[42] - unembedding.mean(0)
        strong.rotation.copy_(direction[None] / direction.norm())
        strong.bias.fill_(8.0)
        weak: Any = attached.edits["model.layers.0"]
        weak.bias.zero_()
        found = explain(attached, tokenizer(), PROMPTS)
    faint, loud = found.sites
    assert loud.constant is not None and loud.constant.writes[0][0] == "w42"
    assert loud.constant.strength == pytest.approx(8.0, rel=1e-4)
    assert faint.removal == pytest.approx(0, abs=1e-6) and loud.removal == pytest.approx(found.effect, rel=1e-4)
    assert found.effect > 0.01
    assert set(faint.change.values()) == {0.0} and set(loud.change) == {-1, -4, -5}
    assert loud.change[-1] > 0.1
    assert "model.layers.2 (block_output): without it" in found.text() and "'w42'" in found.text()
    assert [i.placements["default"].scale for i in attached.engine.interventions.values()] == [1.0, 1.0]


def test_prompts_are_explained_as_training_wrote_them():
    base: Any = TINY["llama"]().eval()
    chat, words = "w3 {{ messages[0].content }} w4", tokenizer()
    words.chat_template = chat
    row = words("w3 w5 w9 w4", return_tensors="pt")
    with torch.no_grad():
        plain = base(**row).logits[0, -1].softmax(-1).topk(2)
        attached = reftune.attach(
            base, method="lobireft", r=1, layers_to_transform=[0, 2], positions="l1", init="paper"
        )
        edited = base(**row).logits[0, -1].softmax(-1).topk(2)
    found = explain(attached, words, ["w5 w9"], words=2)
    for side, expected in zip(found.next_tokens[0], (plain, edited), strict=True):
        assert [token for token, _ in side] == [f"w{index}" for index in expected.indices.tolist()]
        assert [share for _, share in side] == pytest.approx(expected.values.tolist(), rel=1e-4)
    assert [site.early for site in found.sites] == [True, False]
    assert found.text().count("unreliable") == 1
    as_it_is = explain(attached, Encoding(words, "%s"), ["w3 w5 w9 w4"], words=2)
    assert as_it_is == found and explain(attached, Encoding(words), ["w5 w9"], words=2) == found


def test_an_explanation_tells_reading_from_writing():
    model: Any = TINY["llama"]().eval()
    attached = reftune.attach(model, method="direft", r=1, layers_to_transform=[1], positions="l1")
    unembedding = model.get_output_embeddings().weight.detach()
    centred = unembedding - unembedding.mean(0)
    edit: Any = next(iter(attached.edits.values()))
    with torch.no_grad():
        edit.weight.copy_(centred[[10]])
        edit.projection.copy_(centred[[20]])
    (site,) = explain(attached, tokenizer(), PROMPTS).sites
    (direction,) = site.directions
    towards_or_against = [(r[0], w[0]) for r, w in zip(direction.reads, direction.writes, strict=True)]
    assert ("w10", "w20") in towards_or_against  # a singular vector's sign is free, that of the pair is not
    assert direction.strength == pytest.approx(float(centred[10].norm() * centred[20].norm()), rel=1e-4)


def test_an_edit_that_is_not_linear_is_explained_by_its_effect_alone():
    model = TINY["gpt2"]().eval()
    attached = reftune.attach(model, r=2, layers_to_transform=[1], act_fn="relu", init="paper")
    found = explain(attached, tokenizer(), PROMPTS)
    assert found.sites[0].directions == [] and found.sites[0].constant is None and found.effect > 0


def test_bad_input_is_named():
    model, found = TINY["llama"]().eval(), aligned()
    with pytest.raises(ReftuneError, match=r"shape \(4,\): 'left' has 3 directions"):
        from_das(model, found, "left", torch.zeros(4), positions="l1")
    with pytest.raises(ReftuneError, match="method='direft'"):
        from_das(model, found, "left", torch.zeros(3), positions="l1", method="direft")
    with pytest.raises(ReftuneError, match="'middle' is not aligned here"):
        from_das(model, found, "middle", torch.zeros(3), positions="l1")
    with pytest.raises(ReftuneError, match="no direction"):
        empty = SigmoidMask(["v"], 32)
        torch.nn.init.constant_(empty.logits, -1)
        empty.subspace("v")
    with pytest.raises(ReftuneError, match="no interchange"):
        set_interchange(make_edit("direft", 8, 1), torch.eye(1, 8), torch.zeros(1))
    with pytest.raises(ReftuneError, match="carries no ReFT adapter"):
        explain(model, tokenizer(), PROMPTS)
    attached = reftune.attach(model, layers_to_transform=[0])
    with pytest.raises(ReftuneError, match="the second argument is a list; give the base model's tokenizer there"):
        explain(attached, PROMPTS, tokenizer())
    with pytest.raises(ReftuneError, match="prompts is a str: give a list"):
        explain(attached, tokenizer(), PROMPTS[0])
