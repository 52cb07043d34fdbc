"""Tutorial 5: from an alignment to an adapter.

Tutorial 3's transformer carries "the amount reaches the lower bound" in a few directions of a layer. An adapter that sets
these directions, h + R^T(b - Rh), makes the network answer as the causal model does when the variable is held at a value.
First b is read off examples (nothing is trained), then it is learned within the same directions; the same training within
random directions of the same number is the control. The last step lets the adapter explain itself.

    python examples/causal/align_then_steer.py
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from price_network import ANSWERS, answers, encode, label, price_model, price_tokenizer, prompt, trained_network

import reftune
from reftune.causal.accuracy import interchange_accuracy
from reftune.causal.aligned import Aligned
from reftune.causal.alignment import Das
from reftune.causal.bridge import from_das, set_interchange, subspace_target
from reftune.causal.counterfactuals import counterfactuals, factual
from reftune.causal.explain import explain
from reftune.causal.interchange_data import encode_counterfactuals
from reftune.causal.locations import Location
from reftune.causal.training import AlignOptions, align

NAMES, SIZE = ["enough", "affordable"], 4


def main() -> dict[str, float]:
    causal = price_model()
    network = trained_network(causal)

    # 1. The alignment, in the last layer at the last token.
    def interchanges(count: int, seed: int) -> Any:
        return encode_counterfactuals(counterfactuals(causal, count, NAMES, seed=seed), NAMES, encode, label)

    aligned = Aligned(Location("block_output", 2, -1), Das(dict.fromkeys(NAMES, SIZE), network.config.hidden_size))
    align(network, aligned, interchanges(3000, 3), AlignOptions(epochs=8, batch_size=128), choices=ANSWERS)
    found = interchange_accuracy(network, aligned, interchanges(1000, 4), choices=ANSWERS)
    print(f"IIA of the alignment: {found.overall:.3f}")

    # 2. What the adapter should do: answer as if no amount reached the lower bound, or as if every amount did.
    fresh = factual(causal, 1000, seed=5)
    examples = factual(causal, 2000, seed=6)
    scores: dict[str, float] = {}
    for value in (False, True):
        wanted = torch.tensor([label(causal.run(setting, {"enough": value})) for setting in fresh])
        before = float((answers(network, fresh) == wanted).float().mean())
        target = subspace_target(network, aligned, "enough", encode([s for s in examples if s["enough"] is value]))
        adapted = from_das(network, aligned, "enough", target, positions="l1").eval()
        after = float((answers(adapted, fresh) == wanted).float().mean())
        print(f"held at enough = {value}: {before:.3f} of answers agree without the adapter, {after:.3f} with it")
        scores[f"enough={value}"] = after
        with tempfile.TemporaryDirectory() as folder:
            adapted.save_pretrained(folder)
            network = adapted.unload()
            again = PeftModel.from_pretrained(network, folder).eval()
            assert float((answers(again, fresh) == wanted).float().mean()) == after
            network = again.unload()
        assert after >= 0.9 and after - before >= 0.1, (value, before, after)

    # 3. Training within the aligned directions, and within as many random ones.
    wanted = torch.tensor([label(causal.run(setting, {"enough": False})) for setting in fresh])
    train = examples[:1000]
    labels = torch.tensor([label(causal.run(setting, {"enough": False})) for setting in train])
    rotations = {
        "aligned": aligned.alignment.subspace("enough").rotation,
        "random": torch.linalg.qr(torch.randn(network.config.hidden_size, SIZE)).Q.mT.contiguous(),
    }
    for name, rotation in rotations.items():
        config = reftune.ReftConfig(method="loreft", r=SIZE, layers_to_transform=[2], positions="l1")
        adapted = get_peft_model(network, config)
        (edit,) = adapted.base_model.engine.edits("default").values()
        set_interchange(edit, rotation, torch.zeros(SIZE))
        edit.rotation.requires_grad = False
        optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=3e-2)
        for _ in range(15):
            for index in torch.randperm(len(train)).split(100):
                batch = [train[i] for i in index.tolist()]
                logits = adapted(**encode(batch), prompt_lengths=torch.full((len(batch),), 4)).logits[:, -1][:, ANSWERS]
                loss = F.cross_entropy(logits, labels[index])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        scores[name] = float((answers(adapted.eval(), fresh) == wanted).float().mean())
        print(f"trained within {SIZE} {name} directions: {scores[name]:.3f} of answers agree")
        if name == "aligned":
            print(explain(adapted, price_tokenizer(), [prompt(s) for s in fresh[:50]], words=3).text())
        network = adapted.unload()
    assert scores["aligned"] >= 0.95 and scores["random"] <= 0.8, scores
    return scores


if __name__ == "__main__":
    main()
