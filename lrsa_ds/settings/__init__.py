"""The settings of a run, one file for a few groups."""
