"""What every room leaves to people: files replaced whole, pages, pictures, and progress on a terminal.

Open `files.py` for how a file is written, `documents.py` for pages made of templates and for tables, `pictures.py` for
how a figure begins and ends. Imports only `errors`.
"""
