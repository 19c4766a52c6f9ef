"""Answers under the caches that inference would keep, by real prefilling and decoding: `launch/evaluate.py`."""
