"""Keeps only sink and window (StreamingLLM, arXiv 2309.17453)."""

from lrsa_ds.attention.selection.rule import SelectionRule

WINDOW = SelectionRule(keeps_nothing=True)
