"""Long-context post-training of language models on exactly the KV cache that inference will keep."""

import lrsa_ds.parallel.sequence.strategies  # noqa: F401  fills the table of what parallel.exchange may name
from lrsa_ds.attention import SelectionRule, lrsa_attention, register_selection, select_kept
from lrsa_ds.lrsa_config import LRSAConfig
from lrsa_ds.models.cache import LagKVCache
from lrsa_ds.models.decoding import generate
from lrsa_ds.models.inference import load, prefill
from lrsa_ds.models.patch import apply_lrsa, new_cache, trained_caches
from lrsa_ds.models.press import kvpress_press

__version__ = "0.2.0"
__all__ = [
    "LRSAConfig",
    "LagKVCache",
    "SelectionRule",
    "apply_lrsa",
    "generate",
    "kvpress_press",
    "load",
    "lrsa_attention",
    "new_cache",
    "prefill",
    "register_selection",
    "select_kept",
    "trained_caches",
]
