"""Run by test_torch_compile.py in a process of its own: inference in one graph, and none compiled anew for a step."""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from peft import get_peft_model
from transformers import CompileConfig, StaticCache

import reftune
from tests.tiny_models import TINY, tiny_inputs

COUNTERS = torch._dynamo.utils.counters
torch.set_num_threads(1)
warnings.simplefilter("ignore")


def tuned(name: str = "llama", **settings: Any) -> Any:
    torch.manual_seed(0)
    settings = {"r": 2, "init": "paper", "positions": "f1+l2", "task_type": "CAUSAL_LM", **settings}
    return get_peft_model(TINY[name](), reftune.ReftConfig(**settings)).double().eval()


def padded(side: str = "right", length: int = 7) -> dict[str, torch.Tensor]:
    inputs = tiny_inputs("llama", length=length)
    inputs["attention_mask"][0, slice(-2, None) if side == "right" else slice(0, 2)] = 0
    return inputs


def same(one: torch.Tensor, other: torch.Tensor, within: float = 1e-6) -> None:
    # Llama's norms compute in float32, where a last digit of float64 may tip a rounding; GPT-2's do not.
    torch.testing.assert_close(one, other, rtol=0, atol=within)


def graphs() -> int:
    return COUNTERS["stats"]["unique_graphs"]


def forwards() -> None:
    """Plain forwards: one graph, without a break, with the numbers of an eager forward."""
    lengths = torch.tensor([3, 5])
    mask = torch.zeros(2, 7, dtype=torch.bool)
    mask[0, 1] = mask[1, 4:6] = True
    told = {"prompt_lengths": lengths}
    settings: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({}, {}),
        ({"share_weights": False, "component": "mlp_output"}, told),
        ({"positions": "generated", "component": "block_input", "method": "direft"}, told),
        ({}, {"intervention_mask": mask}),
        ({}, {**told, "intervention_directions": torch.tensor([[1, 0], [1, 1]])}),
        ({"positions": "all"}, {"position_ids": torch.arange(7).expand(2, -1)}),
    ]
    for number, (settled, given) in enumerate(settings):
        model, inputs = tuned(**settled), padded("right" if number % 2 else "left")
        torch._dynamo.reset()
        before = graphs()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        same(compiled(**inputs, **given).logits, model(**inputs, **given).logits)
        compiled(**inputs, **given)
        assert graphs() - before == 1, (settled, given)
    torch._dynamo.reset()
    found = torch._dynamo.explain(tuned())(**padded(), **told)
    assert found.graph_count == 1 and found.graph_break_count == 0, found
    for given in ({}, told):
        model = tuned("gpt2", positions="f1+l1")
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        same(compiled(**padded(), **given).logits, model(**padded(), **given).logits, within=1e-12)
    model = tuned()
    packed = tiny_inputs("llama", batch=1, length=7)
    del packed["attention_mask"]
    packed |= {"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2]]), "prompt_lengths": torch.tensor([2, 2])}
    torch._dynamo.reset()
    same(torch.compile(model, backend="eager", fullgraph=True)(**packed).logits, model(**packed).logits)


def own_loop() -> None:
    """A decoding loop of one's own over a static cache: one graph for the prompt, one for all steps."""
    model = tuned()
    inputs, lengths = padded("left"), torch.tensor([5, 7])
    texts = {}
    for kind in ("eager", "compiled"):
        torch._dynamo.reset()
        before = graphs()
        run = torch.compile(model, backend="eager", fullgraph=True) if kind == "compiled" else model
        cache = StaticCache(config=model.config, max_cache_len=16)
        ids, mask, logits = inputs["input_ids"], inputs["attention_mask"], []
        for _ in range(5):
            places = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            whole = torch.nn.functional.pad(mask, (0, 16 - mask.shape[1]))
            given = {"attention_mask": whole, "position_ids": places, "prompt_lengths": lengths}
            out = run(input_ids=ids, past_key_values=cache, **given)
            logits.append(out.logits[:, -1])
            ids = logits[-1].argmax(-1, keepdim=True)
            mask = torch.cat([mask, mask.new_ones(2, 1)], dim=1)
        texts[kind] = torch.stack(logits)
        assert kind == "eager" or graphs() - before <= 3, graphs() - before
    same(texts["compiled"], texts["eager"])


@contextmanager
def edits_seen(model: Any) -> Iterator[list[int]]:
    """An entry for every time that an edit runs, or is traced into a graph."""
    kind = type(next(iter(model.base_model.engine.edits("default").values())))
    seen: list[int] = []
    delta = kind.delta

    def noting(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(1)
        return delta(self, *args, **kwargs)

    kind.delta = noting
    try:
        yield seen
    finally:
        kind.delta = delta


def generation() -> None:
    """transformers' own static cache and compiled steps: no break, no step compiled anew, no edit run where none is."""
    for positions in ("f1+l2", "all"):
        model = tuned(positions=positions)
        eager = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        told = {"return_dict_in_generate": True, "output_logits": True}
        expected = model.generate(**padded("left"), **eager, **told)
        torch._dynamo.reset()
        before = graphs()
        how = CompileConfig(fullgraph=True, dynamic=False, backend="eager", mode=None)
        how._compile_all_devices = True
        options = {**eager, **told, "cache_implementation": "static", "compile_config": how}
        # A graph that ran an edit would look at this list, and be compiled anew as it grows.
        with edits_seen(model) if positions != "all" else nullcontext([]) as seen:
            found = model.generate(**padded("left"), **options)
            compiled = graphs() - before
            with torch.compiler.set_stance("fail_on_recompile"):
                again = model.generate(**padded("left"), **options)
        if positions == "f1+l2":
            assert len(seen) == 2 * model.config.num_hidden_layers, f"{len(seen)}: edits ran in decode steps"
        assert torch.equal(found.sequences, expected.sequences) and torch.equal(again.sequences, expected.sequences)
        same(torch.stack(found.logits), torch.stack(expected.logits))
        assert 1 <= compiled <= 2 and graphs() - before == compiled, (positions, compiled, graphs() - before)


with torch.no_grad():
    forwards()
    own_loop()
    generation()
print("inference runs in one graph")
