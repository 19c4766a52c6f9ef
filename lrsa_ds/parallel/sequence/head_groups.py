"""LRSA attention of one sequence over several ranks: history by head group, window by sequence shard.

1. Lag halo: the rank receives the last S + 2L keys and values of its left neighbour.
2. Selection: it scores, selects and gathers its part of the kept KV, for all KV heads.
3. All-to-all of queries and kept KV, from sequence shards to head groups.
4. During this all-to-all it computes window attention on its shard, all heads; after it, history attention on its head
   group.
5. All-to-all back of the history's output and log-sum-exp; both parts are merged by their log-sum-exp.

The result is that of one rank. Shapes: B batch (1), H query heads, G KV heads, n tokens of the shard, N of the
sequence, D head dim, P ranks.
"""

from functools import lru_cache

import torch

from lrsa_ds.attention.extras import PLAIN, Extras
from lrsa_ds.attention.kernels.interval import merge
from lrsa_ds.attention.kernels.kernel import choose_kernel
from lrsa_ds.errors import require
from lrsa_ds.lrsa_config import LRSAConfig
from lrsa_ds.parallel.sequence.all_to_all import AllToAll, SequenceGroup, start, start_even
from lrsa_ds.parallel.sequence.halo import with_halos
from lrsa_ds.parallel.sequence.keys_and_values import KeysAndValues
from lrsa_ds.parallel.sequence.pieces import select_pieces
from lrsa_ds.parallel.sequence.shard import ShardLayout, shard_layout
from lrsa_ds.parallel.sequence.strategy import Sharing, Strategy, check_stretches


def check_heads(num_heads: int, size: int) -> None:
    """Raises LRSAError unless the query heads can be dealt out evenly over `size` ranks."""
    valid = ", ".join(str(p) for p in range(1, num_heads + 1) if num_heads % p == 0)
    require(
        num_heads % size == 0,
        f"parallel.sp_size={size} does not divide the {num_heads} query heads of the model, which "
        f"parallel.exchange=head_groups and retention 1 (dense attention) distribute; valid here: {valid}.",
    )


def check(sharing: Sharing) -> None:
    check_heads(sharing.num_heads, sharing.size)
    check_stretches(sharing, HEAD_GROUPS)


def heads_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    config: LRSAConfig,
    document_lengths: tuple[int, ...],
    group: SequenceGroup,
    extras: Extras = PLAIN,
    layer: int = 0,
) -> torch.Tensor:
    """`lrsa_attention` of the whole sequence, for the queries of this rank's shard.

    Args:
        q: [1, H, n, D], of this rank's shard; k, v: [1, G, n, D], of v perhaps another D.
        document_lengths: of the whole sequence, summing to N = P * n.

    Returns:
        [1, H, n, D].
    """
    kernel = choose_kernel(
        config, q.device, q.dtype, q.shape[3], needs_lse_gradient=True, value_dim=v.shape[3], extras=extras
    )
    by_blocks = kernel.wants_whole_blocks
    layout = shard_layout(tuple(document_lengths), config, group.size, group.index, by_blocks, q.device)
    heads = HeadGroups(q.shape[1], KeysAndValues.of(k, v), group)
    k, v = with_halos(k, v, layout.halos, group)
    if not any(layout.buffer.num_sent):  # no document is long enough for a history: attend to the window only
        return extras.with_sinks(*kernel(q, k, v, layout.window, extras))[0]
    queries = heads.send_queries(q)
    kept = heads.send_kept(*select_pieces(k, v, layout.buffer.own, config, layer, fast=not kernel.is_readable), layout)
    # Every query sees itself in the window, so the sinks take their share there.
    window = extras.with_sinks(*kernel(q, k, v, layout.window, extras))
    history = kernel(heads.receive_queries(queries), *heads.receive_kept(kept, layout), layout.history, extras)
    return heads.merge(window, heads.return_outputs(*history), q.dtype)


class HeadGroups:
    """The all-to-all between sequence shards (all heads) and head groups (all tokens): H / P query heads on each rank.

    Tensors are exchanged in the layout [tokens, heads, D], which models and flash-attn-4 use too: the part for each
    rank is contiguous, and most copies are avoided.
    """

    def __init__(self, num_heads: int, pair: KeysAndValues, group: SequenceGroup):
        check_heads(num_heads, group.size)
        self.group, self.pair = group, pair
        self.num_heads = num_heads // group.size
        share = num_heads // pair.num_heads
        # The KV head that each query head of each rank reads; fewer KV heads than ranks are sent to several ranks.
        reads = [
            [h // share for h in range(rank * self.num_heads, (rank + 1) * self.num_heads)]
            for rank in range(group.size)
        ]
        self.kv_heads = [slice(heads[0], heads[-1] + 1) for heads in reads]
        mine = reads[group.index]
        self.num_kv_heads = mine[-1] + 1 - mine[0]
        self.place_of_kv = tuple(head - mine[0] for head in mine)

    def send_queries(self, q: torch.Tensor) -> AllToAll:
        tokens = q[0].transpose(0, 1).unflatten(1, (self.group.size, self.num_heads))
        return start_even(self.group, "queries", tokens.transpose(0, 1).contiguous())

    def receive_queries(self, transfer: AllToAll) -> torch.Tensor:
        """[1, H / P, N, D]."""
        return transfer.finish_stacked().flatten(0, 1).transpose(0, 1)[None]

    def send_kept(self, k: torch.Tensor, v: torch.Tensor, layout: ShardLayout) -> AllToAll:
        both = self.pair.stack(k, v)
        parts = [both[:, heads] for heads in self.kv_heads]
        shapes = [(2, self.num_kv_heads, n, self.pair.dim) for n in layout.buffer.num_sent]
        return start(self.group, "kept", parts, shapes)

    def receive_kept(self, transfer: AllToAll, layout: ShardLayout) -> tuple[torch.Tensor, torch.Tensor]:
        """The copies of the whole sequence's kept buffer for the heads of this rank: keys and values [1, G', R, D]."""
        k, v = self.pair.unstack(layout.buffer.history(transfer.finish()))
        per_kv = self.num_heads // self.num_kv_heads
        if self.place_of_kv == tuple(h // per_kv for h in range(self.num_heads)):
            return k, v
        # The head group has only some of the query heads of a KV head: each query head gets its own copy of it.
        places = _on_device(self.place_of_kv, k.device)
        return k.index_select(1, places), v.index_select(1, places)

    def return_outputs(self, out: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """From [1, H / P, N, D] and [1, H / P, N] on head groups to [n, P, H / P, D] and [n, P, H / P] on shards."""
        sent = [
            start_even(self.group, what, x[0].transpose(0, 1).unflatten(0, (self.group.size, -1)).contiguous())
            for what, x in (("outputs", out), ("lse", lse))
        ]
        out, lse = (transfer.finish_stacked().transpose(0, 1) for transfer in sent)
        return out, lse

    def merge(
        self, window: tuple[torch.Tensor, torch.Tensor], history: tuple[torch.Tensor, torch.Tensor], dtype: torch.dtype
    ) -> torch.Tensor:
        """Attention over both parts, [1, H, n, D]: the window's [1, H, n, D], the history's as `return_outputs` has."""
        by_rank = (self.group.size, self.num_heads)
        output, lse = (x[0].transpose(0, 1).unflatten(1, by_rank) for x in window)
        return merge((output, lse), history, dtype).flatten(1, 2).transpose(0, 1)[None]


@lru_cache(maxsize=64)
def _on_device(indices: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """The indices as a tensor, copied once: indexing with a list would copy it to the GPU and synchronise each time."""
    return torch.tensor(indices, device=device)


HEAD_GROUPS = Strategy(
    name="head_groups", owners=lambda size: tuple(range(size)), attend=heads_attention, check=check, merges_parts=True
)
