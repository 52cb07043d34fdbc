"""Answers from an adapter's folder.

Open `loading.py` for the folder with its base and prompt settings, `settings.py` for how answers are written (commands
make their flags of it), `prompts.py` for files of prompts, `generation.py` for answers in batches, `chat.py` for
conversations, `classifying.py` for classifiers. It must not import `cli`, `evaluation` or what is built on them.
"""
