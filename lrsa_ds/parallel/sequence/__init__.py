"""Sequence parallelism: who holds and selects what, and how it is exchanged."""
