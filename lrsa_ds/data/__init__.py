"""From documents and rows to packed token sequences: sources, tokenizer, packing and the stream of a training run."""
