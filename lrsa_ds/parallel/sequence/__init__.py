"""Sequence parallelism: which rank holds and selects which tokens, and what ranks exchange."""
