"""What an edit leaves alone is computed once: keys, values and states before the first edited token and layer.

Open `switch.py` for when it is on, `obstacles.py` for what rules it out (each with its reason), `reuse.py` for a step
on the tails alone, `constant_states.py` for computing what is constant, `store.py` for keeping it within a budget,
`partial_forward.py` for running some of the blocks, `shared_beginning.py` and `row_groups.py` for what rows of one
batch share, `base_identity.py` for whether two trainings may share a store.

Imports the engine and its neighbours in `training`; the trainer imports it, never the other way.
"""
