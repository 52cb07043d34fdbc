"""What every room leaves to people: files replaced whole, pictures, and progress on a terminal.

Open `files.py` for how a file is written, `pictures.py` for how a figure begins and ends. Imports only `errors`.
"""
