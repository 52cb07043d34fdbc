"""Many users of one base model: what their training, storage and answers cost."""
