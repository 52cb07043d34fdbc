"""Reinforcement learning of edits beside LoRA: reward by step and by second."""
