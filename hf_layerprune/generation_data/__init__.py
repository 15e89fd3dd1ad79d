"""Data to heal on that the teacher wrote itself: prompts in, its answers out."""
