"""Quantised bases on a CPU: the memory that edits and LoRA take there."""
