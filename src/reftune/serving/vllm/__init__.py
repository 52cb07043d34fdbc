"""ReFT adapters in upstream vLLM: a plug-in that rides on its LoRA plumbing.

vLLM finds `register` by this distribution's entry point and calls it in each of its processes. A ReFT folder is then
given to vLLM wherever it takes a LoRA folder: names, ids, slots, scheduling, the OpenAI server and its metrics are
vLLM's own, and LoRA adapters go on working beside.

- `hooking.py`: every name of vLLM that is replaced, in one list with its signature; what happens where one has changed.
- `requested.py`: an adapter is read and checked when a request first names it.
- `block_keys.py`: EngineCore: which requests may share a block of the prefix cache.
- `startup.py`: EngineCore: combinations that are refused, and a self-test that an edit moves a token.
- `worker.py`: worker: ReFT adapters in vLLM's cache of adapters, and the four numbers a request of each step.
- `slots.py`: worker: the edits of the adapters in vLLM's slots, and the rows of a step that they edit.
- `edit_op.py`, `kernel.py`: the custom operations that edit, and the Triton kernel of the one for CUDA graphs.
- `blocks.py`: the decoder blocks of a vLLM model, and the hooks on them.
- `server.py`: API server: `model=<name of a folder>`, and the list of all of them in `/v1/models`.
- `launch.py`: `launch` becomes `vllm serve` with the right flags; `supported` says why a model cannot be served so.

Imports `serving` and what that imports. vLLM is imported inside functions, or in files that only these functions
import: without vLLM nothing here fails until it is used.
"""

from __future__ import annotations


def register() -> None:
    """Teach this process of vLLM about ReFT; what vLLM calls, as often as it likes.

    Raises:
        ReftuneError: this vLLM is not one that the plug-in knows, and the server was started to serve ReFT adapters.
    """
    from reftune.serving.vllm.hooking import install

    install()
