"""A training run, from its plan to the exported model."""
