"""The PEFT method over the engine: what `get_peft_model`, `PeftModel` and the Hub meet.

Open `config.py` for the fields of an adapter, `tuner.py` for the model that PEFT makes (and what of PEFT is
overridden), `checkpoint.py` for reading and refusing adapter folders, `tensors.py` for refusing tensors that do not
fit a model, `loading.py` for PEFT's own ways of loading, `starting.py` for training that starts in a direction,
`merging.py` for what can be folded into the weights, `expression.py` for several adapters at once, `info.py` for what
a folder holds without its base model.

Imports `engine`, `edits` and `errors`; knows nothing of data, training or the command line.
"""
