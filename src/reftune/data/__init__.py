"""Dataset formats, chat templates, tokenising and collating: from a file to batches that say where each prompt ends."""
