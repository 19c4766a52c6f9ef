"""The directory of a run: its mark, its lock, and what it may remove."""
