"""The other side of the comparison: libllama of ik-llama-cpp-python, a model and a control vector from a folder.

Logits are those along our greedy tokens; a greedy token is each row's own largest.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path

import gguf
import numpy as np
from ik_llama_cpp import _ctypes_api as api

folder = Path(sys.argv[1])
ask = json.loads((folder / "ask.json").read_text(encoding="utf-8"))
api.llama_backend_init()
model = api.llama_model_load_from_file(str(folder / "model.gguf").encode(), api.llama_model_default_params())
width, layers = api.llama_model_n_embd(model), ask["layers"]
words = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
apply = api._lib.llama_control_vector_apply
apply.argtypes = [ctypes.c_void_p, ctypes.POINTER(ctypes.c_float), ctypes.c_size_t, *[ctypes.c_int32] * 3]


def vector() -> np.ndarray:
    """As `common_control_vector_load` lays it out: layer N's vector at (N - 1) * width, zeros elsewhere."""
    reader = gguf.GGUFReader(str(folder / "vector.gguf"))
    data = np.zeros((layers - 1, width), np.float32)
    for tensor in reader.tensors:
        prefix, _, layer = tensor.name.partition(".")
        assert prefix == "direction" and int(layer) > 0 and tensor.data.shape == (width,)
        data[int(layer) - 1] = tensor.data
    return data.reshape(-1)


def run(prompt: list[int], answer: list[int], added: np.ndarray | None) -> dict[str, list]:
    settings = api.llama_context_default_params()
    settings.n_ctx, settings.n_threads, settings.n_threads_batch = 512, 1, 1
    context = api.llama_init_from_model(model, settings)
    if added is not None:
        data = added.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        assert apply(context, data, added.size, width, 1, layers - 1) == 0
    batch = api.llama_batch_init(512, 0, 1)
    logits, ids, past = [], [], 0
    for tokens in (prompt, *([token] for token in answer[:-1])):
        batch.n_tokens = len(tokens)
        for place, token in enumerate(tokens):
            batch.token[place], batch.pos[place], batch.n_seq_id[place], batch.seq_id[place][0] = token, past, 1, 0
            batch.logits[place] = place == len(tokens) - 1
            past += 1
        assert api.llama_decode(context, batch) == 0
        last = np.ctypeslib.as_array(api.llama_get_logits_ith(context, len(tokens) - 1), (words,))
        logits.append(last.tolist())
        ids.append(int(last.argmax()))
    api.llama_batch_free(batch)
    api.llama_free(context)
    return {"ids": ids, "logits": logits}


added = vector()
found = {
    "base": [run(p, a, None) for p, a in zip(ask["prompts"], ask["base"], strict=True)],
    "steered": [run(p, a, added) for p, a in zip(ask["prompts"], ask["steered"], strict=True)],
}
(folder / "found.json").write_text(json.dumps(found), encoding="utf-8")
