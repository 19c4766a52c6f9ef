"""Models: loading, LRSA in the place of their attention, their cache, generation."""
