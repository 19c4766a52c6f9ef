"""`lrsa_attention`: one function for all backends."""

from collections.abc import Sequence

import torch

from lrsa_ds.attention.buffered import buffered_attention
from lrsa_ds.attention.chunked import chunked_attention
from lrsa_ds.attention.extras import Extras, extras_of
from lrsa_ds.attention.kernels.kernel import choose_kernel
from lrsa_ds.attention.partition import partition_table
from lrsa_ds.dtypes import dtype_name
from lrsa_ds.errors import require
from lrsa_ds.lrsa_config import LRSAConfig


def lrsa_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    config: LRSAConfig,
    document_lengths: Sequence[int] | None = None,
    scale: float | None = None,
    layer: int = 0,
    extras: Extras | None = None,
) -> torch.Tensor:
    """LRSA attention of one layer, over packed documents.

    A token of partition n attends to the sink, the kept KV of partitions up to n - 2, and partitions n - 1 and n up to
    itself. One pass over a complete sequence gives, token by token, the same output as chunk-by-chunk prefill and
    decoding with the compressed cache. Gradients flow through the kept keys and values, not through the selection.

    Args:
        q: queries [B, H, N, D].
        k, v: keys and values [B, G, N, D], with position encoding applied; H is a multiple of G. Values may
            have another head dim D' than keys.
        config: sink size, lag size, retention, selection rule, backend.
        document_lengths: tokens of each packed document, in order; they sum to N and are the same for every row of the
            batch. Each document has its own sink and attends to no other document. Default: one document.
        scale: factor of the scores before the softmax; default 1 / sqrt(D).
        layer: index of the layer, for selection rules that depend on it.
        extras: the scale together with a cap of the scores and learned sinks, instead of `scale`.

    Returns:
        [B, H, N, D'], in the dtype of `q`; under `torch.autocast` in its dtype, to which q, k and v are cast first.

    Raises:
        LRSAError: shapes, dtypes or document lengths do not fit together, or the backend cannot run on the device.

    Source: LRSA, arXiv 2506.11498; selection by LagKV, arXiv 2504.04704.
    """
    lengths = check_shapes(q, k, v, document_lengths)
    extras = extras_of(scale, extras)
    q, k, v = in_one_dtype(q, k, v)
    has_history = not config.is_dense and max(lengths) > config.dense_prefix_size
    kernel = choose_kernel(config, q.device, q.dtype, q.shape[3], has_history, value_dim=v.shape[3], extras=extras)
    if kernel.is_readable:
        return chunked_attention(q, k, v, partition_table(lengths, config), extras, layer)
    return buffered_attention(q, k, v, config, lengths, extras, kernel, layer)


def check_shapes(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, document_lengths: Sequence[int] | None
) -> tuple[int, ...]:
    """The lengths of the documents of a whole sequence; raises LRSAError unless all shapes fit."""
    num_tokens = q.shape[2]
    require(
        k.shape[2] == v.shape[2] == num_tokens
        and k.shape[1] == v.shape[1]
        and q.shape[1] % k.shape[1] == 0
        and q.shape[3] == k.shape[3],
        f"q {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)} do not fit: [batch, heads, tokens, head dim] with "
        "as many tokens each, and query heads a multiple of KV heads.",
    )
    lengths = (num_tokens,) if document_lengths is None else tuple(map(int, document_lengths))
    require(sum(lengths) == num_tokens, f"document_lengths sum to {sum(lengths)}, and there are {num_tokens} tokens.")
    return lengths


def in_one_dtype(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Casts queries, keys and values to the dtype in which attention is computed.

    Under autocast a rotary embedding returns queries and keys in fp32, and a linear layer returns values in bf16.
    """
    device = tensors[0].device.type
    if torch.is_autocast_enabled(device) and all(x.dtype != torch.float64 for x in tensors):
        return tuple(x.to(torch.get_autocast_dtype(device)) for x in tensors)
    dtypes = [dtype_name(x.dtype) for x in tensors]
    require(
        len(set(dtypes)) == 1,
        f"q, k and v have the dtypes {', '.join(dtypes)}: give them in one, or attend under torch.autocast.",
    )
    return tensors
