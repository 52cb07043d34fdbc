"""Which tokens are edited, where in the network, and how a forward carries that: hooks and child modules, no PEFT.

The way of a forward, from `attach` to the edited tensor:

1. `attach.py` makes an `Engine` (`hooks.py`) on the model, or finds the one that is there.
2. `sites.py` and `blocks.py` find the modules that a component and layers name, by structure and never by model name.
3. `Engine.place` gives each block a child module `intervention` (`intervention.py`), which holds the edits by adapter.
4. A forward begins: the root's pre-hook asks the `Planner` (`planning.py`) what is edited in this call.
5. It reads the layout of the tokens, masks, caches and prompt ends (`positions.py`, under compile `traced_layout.py`;
   how positions are written: `position_grammar.py`).
6. While `generate` runs, `prompt_memory.py` remembers mask and prompt lengths across its steps and beams.
7. The result is one immutable `PositionPlan` (`position_plan.py`): the edited rows and positions by adapter.
8. It travels down as a keyword argument to every block; `forwards.py` knows what a module's forward accepts.
9. The hook of the site hands the tensor that passes there to `Intervention.apply_at`.
10. That gathers the planned tokens, applies the edit (`reftune.edits`) in float32, and puts them back.

`generate` and `forward` are stood in for while edits are attached (`stand_ins.py`).

Where other engines lay many requests into one row, `row_plan.py` says which of its tokens are edited; `packed.py` is
that for transformers' continuous batching.

Imports only `edits` and `errors`.
"""
