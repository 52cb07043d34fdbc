"""From a file to batches that say where each prompt ends: one reader for every command.

Open `reading.py` for file types, `formats.py` for the shapes of rows, `classification.py` and `glue.py` for labelled
texts, `templates.py` for chat templates, `tokenising.py` for rows as tokens, `collating.py` for batches,
`splitting.py` for held-out rows, `showing.py` for `--show`, `persona.py` for the bundled rows. Imports only `errors`.
"""
