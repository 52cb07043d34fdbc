"""Many users of one base model: their edits trained together, and kept in one folder.

- `stack.py`: several users' edits as one, and a step of AdamW that is each user's own; `cohort.py`: training those of a
  cohort as if each were alone, or what all users share; `run.py`: a recipe with `adapter_column`, from a file of rows
  to a store; `adapt.py`: one user more.
- `store.py`: `UserStore`, a folder with an index of names and files whose rows are users; `shards.py`: one such file;
  `names.py`: what a user may be called.

The store imports `adapter`, `output` and `errors` alone, so that `serving` can read one; training imports `runs` and
`training` too. The room must not import `cli` or `serving`.
"""
