"""Room for several compilations of one function, for every use of `torch.compile` here."""

import torch

MOST_COMPILED = 64  # models, numbers of rows, lengths and gradient modes of one process; torch's 8 are soon reached


def allow_recompiling() -> None:
    """Raises the limit of compilations, beyond which dynamo runs a function uncompiled, without a word."""
    torch._dynamo.config.recompile_limit = max(MOST_COMPILED, torch._dynamo.config.recompile_limit)
