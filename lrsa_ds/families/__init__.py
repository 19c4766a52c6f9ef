"""Which families of transformers' causal language models LRSA trains: each built tiny, and measured."""
