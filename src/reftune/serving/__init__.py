"""Many adapters on one base model: folded edits in a bank, and which tokens of a batch each of them edits.

- `folded.py`: `read_folded(folder)` gives an adapter as arithmetic, h + (hA + b)B a site, without a model or PEFT.
- `bank.py`: `Bank` keeps many of them as stacked tensors, within a budget; a request takes one and keeps it.
- `engine.py`: `EmbeddedEngine` writes many answers at once, with transformers' continuous batching; `packed_edits.py`
  applies a bank to its batches, `packed_attention.py` attends request by request on a CPU, `sampling.py` chooses each
  answer's tokens.
- `requests.py`: what an engine is asked and gives back.
- `user_rows.py`: `attach_store`, a store's users in `generate` and ordinary forwards.
- `catalogue.py`: which adapters may be served, found without loading; `choosing.py`: which engine serves.
- `server.py` and `settings.py`: `reftune serve`; the room `api` is its HTTP interface, the room `page` its page.
- The room `vllm` is a plug-in that serves the same adapters in an installed vLLM.

It must not import `cli`, `training` or what is built on them. `folded.py` and `bank.py` import nothing of
transformers or PEFT when they are imported, so that an inference engine's process can use them.
"""
