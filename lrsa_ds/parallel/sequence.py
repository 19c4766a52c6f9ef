"""LRSA attention of one sequence over several ranks: each prefills its shard, and only the kept KV travels.

1. Lag halo: the last S + 2L keys and values of the left neighbour.
2. Chunk-prefill of the shard: score, select, gather; the rank's part of the kept KV, for all KV heads.
3. All-to-all of queries and kept KV, from sequence shards to head groups.
4. Window attention on the shard, all heads, while they travel; then history attention on the head group.
5. All-to-all back of history output and log-sum-exp, and the merge of both parts by their log-sum-exp.

The result is that of one rank. Shapes: B batch (1), H query heads, G KV heads, n tokens of the shard, N of the
sequence, D head dim, P ranks.
"""

from dataclasses import replace

import torch

from lrsa_ds.attention.backends import KERNELS, choose_backend
from lrsa_ds.attention.interval import merge
from lrsa_ds.attention.select import fast_select_partitions, gather_kept, select_partitions
from lrsa_ds.config import LRSAConfig, require
from lrsa_ds.parallel.exchange import Exchange, SequenceGroup, start
from lrsa_ds.parallel.shard import ShardLayout, shard_layout


def check_heads(num_heads: int, size: int) -> None:
    """Raises LRSAError unless the query heads can be dealt out evenly over `size` ranks."""
    valid = ", ".join(str(p) for p in range(1, num_heads + 1) if num_heads % p == 0)
    require(
        num_heads % size == 0,
        f"parallel.sp_size={size} does not divide the {num_heads} query heads of the model; valid here: {valid}.",
    )


def sequence_parallel_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    config: LRSAConfig,
    document_lengths: tuple[int, ...],
    group: SequenceGroup,
    scale: float | None = None,
) -> torch.Tensor:
    """`lrsa_attention` of the whole sequence, for the queries of this rank's shard.

    Args:
        q: [1, H, n, D], of this rank's shard; k, v: [1, G, n, D].
        document_lengths: of the whole sequence, summing to N = P * n.

    Returns:
        [1, H, n, D].
    """
    if config.backend == "auto" and q.is_cuda:
        # flash-attn-4's gradients through the log-sum-exp have not been compared on a GPU yet: only on request.
        config = replace(config, backend="flex")
    backend = choose_backend(config, q.device, q.dtype, q.shape[3])
    attend, by_blocks = KERNELS[backend], backend != "chunked"
    layout = shard_layout(tuple(document_lengths), config, group.size, group.index, by_blocks, q.device)
    heads = HeadGroups(q.shape[1], k.shape[1], group)
    halo_k, halo_v = exchange_halo(k, v, layout, group)
    k, v = torch.cat([halo_k, k], dim=2), torch.cat([halo_v, v], dim=2)
    if not any(layout.num_sent):  # every document is short: the window is all there is
        return attend(q, k, v, layout.window, scale)[0]
    queries = heads.send_queries(q)
    kept = heads.send_kept(*kept_of_shard(k, v, layout, config, by_blocks), layout)
    window = attend(q, k, v, layout.window, scale)
    history = attend(heads.receive_queries(queries), *heads.receive_kept(kept, layout), layout.history, scale)
    return merge(window, heads.return_outputs(*history), q.dtype)


def exchange_halo(
    k: torch.Tensor, v: torch.Tensor, layout: ShardLayout, group: SequenceGroup
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of the halo: two [1, G, halo, D], with gradients to the neighbour that owns them."""
    num_sent = layout.sent_halo_size
    # Empty parts are slices of k: every rank must be in the graph, or it would miss the backward exchange.
    parts = [k[0, :, :0]] * group.size
    if num_sent:
        # A shard is at least as long as the halo, so that the halo lies in one neighbour's shard.
        parts[group.index + 1] = torch.stack([x[0, :, -num_sent:] for x in (k, v)])
    shapes = [(0,)] * group.size
    if layout.halo_size:
        shapes[group.index - 1] = (2, k.shape[1], layout.halo_size, k.shape[3])
    received = start(group, "halo", parts, shapes).finish()
    if not layout.halo_size:
        # The exchange stays in the graph: its backward pass brings the gradients of the halo that was sent.
        nothing = received[0].sum() * 0
        return k[:, :, :0] + nothing, v[:, :, :0]
    return received[group.index - 1][0][None], received[group.index - 1][1][None]


def kept_of_shard(
    k: torch.Tensor, v: torch.Tensor, layout: ShardLayout, config: LRSAConfig, fast: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's part of the kept buffer, in its order: keys and values [1, G, slots, D] from [halo | shard]."""
    select = fast_select_partitions if fast else select_partitions
    kept = select(k, v, layout.starts, config.lag_size, config.num_kept).flatten(2)
    sinks = layout.sink_positions.expand(*k.shape[:2], -1)
    positions = torch.cat([sinks, kept], dim=2)[:, :, layout.order]
    return gather_kept(k, positions), gather_kept(v, positions)


class HeadGroups:
    """The exchange between sequence shards (all heads) and head groups (all tokens): H / P query heads on each rank.

    Another exchange has the same six methods: send and receive the queries and the kept KV, and return the outputs.
    """

    def __init__(self, num_heads: int, num_kv_heads: int, group: SequenceGroup):
        check_heads(num_heads, group.size)
        self.group = group
        self.num_heads = num_heads // group.size
        share = num_heads // num_kv_heads
        # The KV head that each query head of each rank reads; fewer KV heads than ranks are sent to several ranks.
        reads = [
            [h // share for h in range(rank * self.num_heads, (rank + 1) * self.num_heads)]
            for rank in range(group.size)
        ]
        self.kv_heads = [sorted(set(heads)) for heads in reads]
        mine = self.kv_heads[group.index]
        self.place_of_kv = [mine.index(head) for head in reads[group.index]]

    def send_queries(self, q: torch.Tensor) -> Exchange:
        parts = list(q[0].split(self.num_heads))
        return start(self.group, "queries", parts, [tuple(parts[0].shape)] * self.group.size)

    def receive_queries(self, exchange: Exchange) -> torch.Tensor:
        """[1, H / P, N, D]."""
        return torch.cat(exchange.finish(), dim=1)[None]

    def send_kept(self, k: torch.Tensor, v: torch.Tensor, layout: ShardLayout) -> Exchange:
        both = torch.stack([k[0], v[0]])
        parts = [both[:, heads] for heads in self.kv_heads]
        mine = len(self.kv_heads[self.group.index])
        return start(self.group, "kept", parts, [(2, mine, n, k.shape[3]) for n in layout.num_sent])

    def receive_kept(self, exchange: Exchange, layout: ShardLayout) -> tuple[torch.Tensor, torch.Tensor]:
        """The kept buffer of the whole sequence for the heads of this rank: keys and values [1, G', R, D]."""
        # index_select, since the backward pass of indexing sorts, to add in a fixed order what never meets here.
        k, v = torch.cat(exchange.finish(), dim=2).index_select(2, layout.buffer_slots)[:, None]
        per_kv = self.num_heads // k.shape[1]
        if self.place_of_kv == [h // per_kv for h in range(self.num_heads)]:
            return k, v
        # The head group cuts through the query heads of a KV head: each query head gets a KV head of its own.
        return k[:, self.place_of_kv], v[:, self.place_of_kv]

    def return_outputs(self, out: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """From [1, H / P, N, D] and [1, H / P, N] on head groups to [1, H, n, D] and [1, H, n] on shards."""
        results = []
        for what, x in (("outputs", out), ("lse", lse)):
            parts = list(x[0].chunk(self.group.size, dim=1))
            results.append(start(self.group, what, parts, [tuple(parts[0].shape)] * self.group.size))
        out, lse = (torch.cat(exchange.finish(), dim=0)[None] for exchange in results)
        return out, lse
