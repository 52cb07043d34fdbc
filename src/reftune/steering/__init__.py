"""Edits without training: the difference of two sets of hidden states, with a strength that was measured.

Open `contrasts.py` for what is read and made into two sets of rows, `states.py` for their hidden states,
`directions.py` for the vectors that tell them apart, `strength.py` for an edit's strength, `gates.py` for where it
acts, `settings.py` for the flags, `search.py` for the layers and the strength that work best, `run.py` for the whole of
`reftune steer`, `report.py` for what it says and draws, `vectors.py` for files of llama.cpp and repeng.

A direction is written as an ordinary adapter (`lobireft`: h + R^T b; behind a gate `gated`). Imports neither `cli` nor
`serving`.
"""
