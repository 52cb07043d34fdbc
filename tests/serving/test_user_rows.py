"""Users of a store in ordinary forwards: as the folders that they would be exported to, without a module each."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from torch import nn

from reftune.adapter.checkpoint import CONFIG_FILE
from reftune.errors import ReftuneError
from reftune.serving.bank import Bank
from reftune.serving.user_rows import attach_store
from reftune.users.store import UserStore
from tests.serving.adapters import save_adapter
from tests.tiny_models import CAUSAL

NAMES = ["anna", "bob", "carl"]
PROMPTS = torch.tensor([[0, 0, 5, 6, 7], [3, 4, 5, 6, 7], [0, 9, 8, 7, 6], [0, 0, 0, 11, 12]])
ROWS = ["bob", "__base__", "anna", "bob"]
INPUTS = {"input_ids": PROMPTS, "attention_mask": (PROMPTS != 0).long()}


def users_on(model: nn.Module, root, **config):
    """A store of users, and the folders that it exports."""
    for place, name in enumerate(NAMES):
        save_adapter(model, root / name, seed=place, **{"r": 2, **config})
        saved = json.loads((root / name / CONFIG_FILE).read_text())
        (root / name / CONFIG_FILE).write_text(json.dumps({**saved, "base_model_name_or_path": "tiny"}))
    store = UserStore.create(root / "store", json.loads((root / "anna" / CONFIG_FILE).read_text()), "tiny")
    for name in NAMES:
        store.import_folder(root / name, name)
        store.export(name, root / "out" / name)
    return store, {name: root / "out" / name for name in NAMES}


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", {"positions": "l1"}),
        ("llama", {"positions": "f2+l2", "share_weights": False, "layers_to_transform": [1]}),
        ("llama", {"positions": "all", "component": "mlp_output"}),
        ("llama", {"positions": "l2+generated", "act_fn": "tanh"}),
        ("gpt2", {"positions": "prompt", "component": "value_output"}),
        ("opt", {"positions": "f1+l1", "component": "mlp_input"}),
    ],
)
def test_logits_and_answers_are_those_of_the_exported_folders(family, config, tmp_path) -> None:
    model = CAUSAL[family]()
    store, folders = users_on(model, tmp_path, **config)
    with torch.no_grad():
        plain = model(**INPUTS).logits
        with attach_store(model, store):
            modules = len(list(model.modules()))
            logits = model(**INPUTS, adapter_names=ROWS).logits
            answers = model.generate(**INPUTS, adapter_names=ROWS, max_new_tokens=6, do_sample=False, pad_token_id=0)
            beams = model.generate(**INPUTS, adapter_names=ROWS, max_new_tokens=4, num_beams=2, pad_token_id=0)
            assert torch.equal(model(**INPUTS).logits, plain)
            assert len(list(model.modules())) == modules
        assert torch.equal(model(**INPUTS).logits, plain)
        peft = PeftModel.from_pretrained(model, str(folders["anna"]), adapter_name="anna").eval()
        peft.load_adapter(str(folders["bob"]), "bob")
        expected = peft(**INPUTS, adapter_names=ROWS).logits
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        assert (expected - plain).abs().max() > 0.1
        options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(answers, peft.generate(**INPUTS, adapter_names=ROWS, **options))
        found = peft.generate(**INPUTS, adapter_names=ROWS, max_new_tokens=4, num_beams=2, pad_token_id=0)
        assert torch.equal(beams, found)


def test_a_user_who_is_replaced_or_added_is_seen_and_others_can_go_out_of_memory(tmp_path) -> None:
    model = CAUSAL["llama"]()
    store, _ = users_on(model, tmp_path)
    with torch.no_grad(), attach_store(model, store.path, max_bytes=1) as attached:
        bank: Bank = attached.engine.bank  # type: ignore[attr-defined]
        first = {name: model(**INPUTS, adapter_names=[name] * 4).logits for name in NAMES}
        assert bank.loads == 3 and bank.loaded == []
        store.write({"anna": store.read("carl"), "dora": store.read("bob")})
        assert torch.equal(model(**INPUTS, adapter_names=["anna"] * 4).logits, first["carl"])
        assert torch.equal(model(**INPUTS, adapter_names=["dora"] * 4).logits, first["bob"])


def test_what_cannot_be_is_refused_and_leaves_the_base(tmp_path) -> None:
    model = CAUSAL["llama"]()
    store, _ = users_on(model, tmp_path)
    other = CAUSAL["gpt2"]()
    with torch.no_grad(), attach_store(model, store):
        plain = model(**INPUTS).logits
        for names, words in {
            ("zoe", "bob", "bob", "bob"): "no user 'zoe'", ("bob",) * 3: "3 names for 4 rows", "bob!": "give a list",
            ("../bob",) * 4: "a name has",
        }.items():  # fmt: skip
            for call in (model, model.generate):
                with pytest.raises(ReftuneError, match=words):
                    call(**INPUTS, adapter_names=names if isinstance(names, str) else list(names))
        assert torch.equal(model(**INPUTS).logits, plain)
        with pytest.raises(ReftuneError, match="carries edits already"):
            attach_store(model, store)
    with attach_store(other, store), pytest.raises(ReftuneError, match="another base model"):
        other(**INPUTS, adapter_names=["bob"] * 4)
