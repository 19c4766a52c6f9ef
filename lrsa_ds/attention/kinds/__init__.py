"""Kinds of layers: the table.

To add a kind, write a file with its settings and functions, and add it here. A layer in which each token sees a run of
tokens that ends with itself needs little more than where the run begins, see `local.py`; one without keys and values
has no functions, see `keyless.py`.
"""

from lrsa_ds.attention.cached import cached_attention, cached_attention_of_last, compress
from lrsa_ds.attention.kinds.chunked_attention import CHUNKED_ATTENTION, ChunkedAttention
from lrsa_ds.attention.kinds.keyless import KEYLESS, Keyless
from lrsa_ds.attention.kinds.kind import LayerKind
from lrsa_ds.attention.kinds.sliding_window import SLIDING_WINDOW, SlidingWindow
from lrsa_ds.attention.lrsa import lrsa_attention
from lrsa_ds.attention.partition import partition_table
from lrsa_ds.lrsa_config import LRSAConfig
from lrsa_ds.registry import LAYER_KINDS

LRSA = LayerKind(
    attend=lrsa_attention,
    attend_cached=cached_attention,
    attend_last=cached_attention_of_last,
    compress=compress,
    num_pairs=lambda lengths, config: partition_table(lengths, config).num_pairs,
)

LAYER_KINDS.add(LRSAConfig.kind, LRSA)
LAYER_KINDS.add(SlidingWindow.kind, SLIDING_WINDOW)
LAYER_KINDS.add(ChunkedAttention.kind, CHUNKED_ATTENTION)
LAYER_KINDS.add(Keyless.kind, KEYLESS)
