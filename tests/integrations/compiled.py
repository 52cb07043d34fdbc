"""Run by test_torch_compile.py in a process of its own, without the runtime type checks, which are not made for tracing."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from peft import get_peft_model

import reftune
from tests.tiny_models import TINY, tiny_inputs

COUNTERS = torch._dynamo.utils.counters


def tuned(component: str):
    config = reftune.ReftConfig(r=2, init="paper", positions="f1+l1", component=component, task_type="CAUSAL_LM")
    return get_peft_model(TINY["llama"](), config)


def batch(length: int) -> dict[str, torch.Tensor]:
    inputs = tiny_inputs("llama", length=length)
    inputs["labels"] = inputs["input_ids"].clone()
    inputs["labels"][:, :4] = -100
    return inputs


def gradients(model, forward, inputs) -> list[torch.Tensor]:
    model.zero_grad()
    forward(**inputs).loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.requires_grad]


for component in ("block_output", "mlp_output"):
    model = tuned(component)
    compiled = torch.compile(model, backend="aot_eager")
    for length in (7, 9):
        model.train()
        for one, other in zip(
            gradients(model, compiled, batch(length)), gradients(model, model, batch(length)), strict=True
        ):
            torch.testing.assert_close(one, other)
        model.eval()
        with torch.no_grad():
            torch.testing.assert_close(compiled(**batch(length)).logits, model(**batch(length)).logits)
    torch._dynamo.reset()
    with torch.no_grad():  # the base's forward by itself, which edits too
        direct = torch.compile(model.get_base_model().forward, backend="eager", fullgraph=True)
        torch.testing.assert_close(direct(**batch(7)).logits, model(**batch(7)).logits)
    torch._dynamo.reset()

model = tuned("block_output").eval()
compiled = torch.compile(model, backend="eager")
with torch.no_grad():
    for _ in range(3):
        compiled(**tiny_inputs("llama"))
    before = COUNTERS["stats"]["unique_graphs"]
    for _ in range(4):
        compiled(**tiny_inputs("llama"))
assert COUNTERS["stats"]["unique_graphs"] == before, "a graph was compiled anew for the same shapes"

print("compiled forwards and gradients agree")
