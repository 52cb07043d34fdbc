"""Many users of one base model: their edits kept in one folder.

- `store.py`: `UserStore`, a folder with an index of names and files whose rows are users; `shards.py`: one such file.

The store imports `adapter`, `output` and `errors` alone, so that `serving` can read one; the room must not import
`cli` or `serving`.
"""
