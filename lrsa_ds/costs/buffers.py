"""How many keys attention holds and sends, from the layout of the tokens: integers only.

A rank attends over [copies of the kept buffer | halos and its own tokens], see `lrsa_ds.attention.buffered` and
`lrsa_ds.parallel.sequence`.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

from lrsa_ds.attention.kernels.blocks import BLOCK, copy_history, in_blocks, queries_ahead
from lrsa_ds.attention.kinds.kind import kind_of
from lrsa_ds.attention.partition import PartitionTable, cut, partition_table
from lrsa_ds.costs.job import Job
from lrsa_ds.layer_settings import LayerSettings
from lrsa_ds.lrsa_config import LRSAConfig
from lrsa_ds.parallel.sequence.halo import halo_layout
from lrsa_ds.parallel.sequence.pieces import halo_size
from lrsa_ds.registry import EXCHANGES


@dataclass(frozen=True)
class Keys:
    """Of one layer, for each KV head.

    Args:
        copied: slots of the copies of the kept buffer, on the rank that has most.
        halo: tokens of all halos of a rank that has most.
        kept: slots that all ranks contribute to the kept buffer.
        halos_sent: tokens of all halos that the ranks send to each other.
    """

    copied: int = 0
    halo: int = 0
    kept: int = 0
    halos_sent: int = 0


def keys_of(job: Job, config: LayerSettings) -> Keys:
    """The keys of a layer with these settings, on a kernel that takes whole blocks; none for dense attention."""
    if isinstance(config, LRSAConfig):
        return Keys() if config.is_dense else _keys(job.document_lengths, config, job.sp_size, job.exchange)
    halo = kind_of(config).halo
    if job.sp_size == 1 or halo is None:
        return Keys()
    owners = EXCHANGES[job.exchange].owners(job.sp_size)
    return _halos(owners, sum(job.document_lengths), in_blocks(halo.size(config)))


def _halos(owners: tuple[int, ...], num_tokens: int, halo: int) -> Keys:
    """Those of a layer that needs so many tokens before each stretch, and nothing else of other ranks."""
    layouts = [halo_layout(owners, num_tokens, halo, rank) for rank in range(max(owners) + 1)]
    sent = sum(sum(layout.num_received) - layout.num_received[rank] for rank, layout in enumerate(layouts))
    return Keys(halo=max(sum(layout.num_received) for layout in layouts), halos_sent=sent)


@lru_cache(maxsize=1024)
def _keys(lengths: tuple[int, ...], config: LRSAConfig, size: int, exchange: str) -> Keys:
    table = partition_table(lengths, config, align=BLOCK)
    kept = sum(table.sink_size + d.num_partitions * table.num_kept for d in table.kept_documents)
    if size == 1:
        ahead = queries_ahead(table)
        return Keys(copied=copy_history(table.chunks, table, ahead)[1].size if kept else 0, kept=kept)
    owners = EXCHANGES[exchange].owners(size)
    length = table.num_tokens // len(owners)
    halos = _halos(owners, table.num_tokens, halo_size(config, length, by_blocks=True))
    if EXCHANGES[exchange].merges_parts:  # every rank attends to the history of all queries, with a group of heads
        copied = copy_history(table.chunks, table)[1].size if kept else 0
    else:
        copied = max(_copies_of(table, owners, rank, length) for rank in range(size)) if kept else 0
    return replace(halos, copied=copied, kept=kept)


def _copies_of(table: PartitionTable, owners: tuple[int, ...], rank: int, length: int) -> int:
    """Slots of the copies for the queries of the stretches of `rank`, which count from 0 on."""
    chunks, first = [], 0
    for number in [i for i, owner in enumerate(owners) if owner == rank]:
        start = number * length
        mine = cut(table.chunks, start, start + length)
        chunks += [replace(c, q_lo=c.q_lo + first - start, q_hi=c.q_hi + first - start) for c in mine]
        first += length
    return copy_history(chunks, table)[1].size
