"""Measures what compressed caches take from each layer, at the positions that predict answers."""
