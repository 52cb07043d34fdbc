"""What every room leaves to people, and finds again: files replaced whole, pages, pictures, and text on a terminal.

Open `files.py` for how a file is written, `json_files.py` for how one is read that somebody else may have written,
`targets.py` for where anything may be written at all, `locks.py` for one run at a time, `terminal.py` for what a
terminal is shown, `interrupt.py` for what Ctrl-C does, `documents.py` for pages made of templates and for tables,
`pictures.py` for how a figure begins and ends. Imports only `errors`.
"""
