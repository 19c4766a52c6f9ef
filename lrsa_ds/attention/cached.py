"""LRSA attention of new tokens behind a compressed cache: the same function as one pass over the whole sequence."""

from dataclasses import replace

import torch

from lrsa_ds.attention.chunked import attend_causally, attend_chunks
from lrsa_ds.attention.kept_buffer import gather_kept
from lrsa_ds.attention.partition import num_compressed_partitions, partition_table, room_in_chunk
from lrsa_ds.attention.selection.rule import Partitions
from lrsa_ds.attention.selection.select import fast_select_partitions
from lrsa_ds.lrsa_config import LRSAConfig


def cached_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    num_seen: int,
    config: LRSAConfig,
    scale: float | None = None,
    layer: int = 0,
) -> torch.Tensor:
    """Attention of n new tokens of a document of which `num_seen` tokens were seen before.

    Args:
        q: queries of the new tokens, [B, H, n, D].
        k, v: [B, G, c + n, D]: what `LagKVCache` holds of the tokens before, [sink | kept KV of the compressed
            partitions | all tokens since], and those of the new tokens.

    Returns:
        [B, H, n, D]. Where the new tokens span several chunks, each chunk sees what it would have seen alone.
    """
    num_new = q.shape[2]
    if num_new <= room_in_chunk(num_seen, config):
        return attend_causally(q, k, v, scale)
    num_compressed = num_compressed_partitions(num_seen, config)
    # Token t stands at place t - missing of k, if it is not one of the compressed partitions.
    missing = num_compressed * (config.lag_size - config.num_kept)
    table = partition_table((num_seen + num_new,), config)
    (document,) = table.kept_documents
    before = config.sink_size + num_compressed * config.num_kept
    count = document.num_partitions - num_compressed
    partitions = Partitions.adjacent(before, count, config.lag_size, k.device, number=num_compressed)
    kept = fast_select_partitions(k, v, partitions, config, layer).flatten(2)
    kept_k, kept_v = (torch.cat([x[:, :, :before], gather_kept(x, kept)], dim=2) for x in (k, v))
    chunks = [replace(c, q_lo=max(c.q_lo, num_seen)) for c in table.chunks if c.q_hi > num_seen]
    return attend_chunks(q, k, v, kept_k, kept_v, chunks, scale, first_query=num_seen, first_key=missing)
